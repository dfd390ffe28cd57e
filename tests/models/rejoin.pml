/* SPDX-License-Identifier: Apache-2.0
 *
 * rejoin.pml - how a rank comes back under its number on a one-sided transport (src/host/control_return.c, shm_rejoin.c).
 * RANKS ranks, of which the first SOURCES store a shard each; DEATHS deaths and UPDATES updates, at any step.
 *
 *   1. A shard lives as long as anybody maps it. Every living rank maps every shard, also those of ranks that died.
 *   2. A rank that returns is COMING: agreements do not count it, nobody waits for it, passes of the others go on. It is
 *      counted only where no update is under way, and who finds no living rank is refused.
 *   3. Once it is counted it maps the shard of every number from any living rank. Updates wait for it meanwhile, so none
 *      can begin to write.
 *   4. An update is refused in both its agreements unless every source lives and is counted.
 *   5. A death between the two agreements refuses the update: nothing has changed. A source's death after the second breaks the
 *      series: generations may be mixed, so passes and rejoins are refused, naming the update, until all load again.
 *   6. Every wait ends at a deadline: of the second agreement as in 5 before it, of the third as in 5 after it.
 *
 * Each MUTANT_ is a fault that Spin has to find.
 */
#define GONE 0    /* its process is no more */
#define COMING 1  /* it is not counted yet */
#define LIVES 2
#define DRAINED 3 /* in an update, reads nothing */
#define EACH(index) for (index : 0 .. RANKS - 1)

byte state[RANKS] = LIVES, got[RANKS] = RANKS;
byte generation[RANKS], mapped[RANKS]; /* mapped: 255 where generations were mixed */
byte deaths, updates, written;
bool reading[RANKS], updating, broken;
hidden byte i;

#define FOR_ALL(what) (what(0) && what(1) && what(RANKS - 1))
#define LIVING(rank) (state[rank] == LIVES || state[rank] == DRAINED)
#define SOMEBODY (LIVING(0) || LIVING(1) || LIVING(RANKS - 1))
#define HAS(rank) (LIVING(rank) && got[rank] == RANKS)
#define SOMEBODY_HAS (HAS(0) || HAS(1) || HAS(RANKS - 1))
#define MAPS(rank) (state[rank] == LIVES && HAS(rank))
#define STILL(rank) (state[rank] != LIVES)
#define WROTE(rank) (written & (1 << (rank)))
#ifdef MUTANT_DEAD_SOURCE
#define SOURCE(rank) true
#elif defined(MUTANT_COUNTED_EARLY)
#define SOURCE(rank) (rank >= SOURCES || state[rank] != GONE)
#else
#define SOURCE(rank) (rank >= SOURCES || LIVING(rank))
#endif
#define HAS_WRITTEN(rank) (WROTE(rank) || !LIVING(rank))

inline end_update()
{
	updating = false;
	written = 0;
	EACH(i) {
		if
		:: state[i] == DRAINED -> state[i] = LIVES; mapped[i] = generation[0]
		:: else
		fi
	}
	i = 0
}

inline leave(rank) { state[rank] = GONE; reading[rank] = false; got[rank] = 0; mapped[rank] = 0 }

active [RANKS] proctype rank()
{
	do
	:: d_step { MAPS(_pid) && !broken && !reading[_pid] -> reading[_pid] = true }
	:: d_step { reading[_pid] ->
		    EACH(i) { assert(broken || i >= SOURCES || generation[i] == mapped[_pid]) } /* a pass sees one generation */
		    i = 0; reading[_pid] = false }
	:: d_step { state[_pid] != GONE && deaths < DEATHS -> /* killed, or it leaves */
#ifndef MUTANT_NOT_BROKEN
		    if :: written && _pid < SOURCES && state[_pid] != COMING -> broken = true :: else fi;
#endif
		    leave(_pid); deaths++ }
	:: d_step { state[_pid] == GONE && !broken && SOMEBODY -> state[_pid] = COMING }
#ifdef MUTANT_IN_UPDATE
	:: d_step { state[_pid] == COMING && !broken && SOMEBODY ->
#else
	:: d_step { state[_pid] == COMING && !broken && !updating && SOMEBODY ->
#endif
		    state[_pid] = LIVES; mapped[_pid] = generation[0] }
	:: d_step { state[_pid] == LIVES && got[_pid] < RANKS && SOMEBODY_HAS ->
		    if :: got[_pid] < SOURCES && generation[got[_pid]] != mapped[_pid] -> mapped[_pid] = 255 :: else fi;
		    got[_pid]++ }
	/* An update: its first agreement; each drains; the second; each writes; the third. */
	:: d_step { state[_pid] == LIVES && !updating && updates < UPDATES && !broken && FOR_ALL(SOURCE) ->
		    updating = true; updates++ }
	:: d_step { MAPS(_pid) && updating && !reading[_pid] -> state[_pid] = DRAINED }
	:: d_step { state[_pid] == DRAINED && !WROTE(_pid) && !broken && FOR_ALL(STILL) && (written || FOR_ALL(SOURCE)) ->
		    written = written | (1 << _pid); generation[_pid]++ }
	:: d_step { state[_pid] == DRAINED && written && !broken && FOR_ALL(HAS_WRITTEN) -> end_update() }
#ifndef MUTANT_NO_DEADLINE
	:: d_step { state[_pid] == DRAINED && !written -> end_update() }
	:: d_step { state[_pid] == DRAINED && written -> broken = true; end_update() }
	:: d_step { state[_pid] == COMING && (broken || updating || !SOMEBODY) -> leave(_pid) }
	:: d_step { state[_pid] == LIVES && got[_pid] < RANKS && !SOMEBODY_HAS -> leave(_pid) }
#endif
	/* It calls no more: nobody starts it again, or it stands still. */
	:: !reading[_pid] && (state[_pid] == GONE || MAPS(_pid)) -> break
	od
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * rejoin.pml - how a rank is to come back under its number on a one-sided transport: the design, which no code follows
 * yet. RANKS ranks, each the source of one shard; DEATHS deaths and UPDATES updates, at any step.
 *
 *   1. A shard lives as long as anybody maps it. Every living rank maps every shard, also those of ranks that died.
 *   2. A rank that returns is COMING: agreements do not count it, nobody waits for it, passes of the others go on. It
 *      maps the shard of every number from any living rank, and is the source of its own number again only when it has
 *      mapped all. Its death before that is nobody's concern; who finds no living rank is refused.
 *   3. An update is refused in both its agreements unless the source of every number lives and is counted. So no
 *      generation changes while a rank is away or COMING, and update and rejoin need no other guard.
 *   4. A death between the two agreements refuses the update: nothing has changed. A death after the second breaks the
 *      series: generations may be mixed, so passes and rejoins are refused, naming the update, until all load again.
 *   5. Every wait ends at a deadline: of the second agreement as in 4 before it, of the third as in 4 after it.
 *
 * Each MUTANT_ is a fault that Spin has to find.
 */
#define GONE 0    /* its process is no more */
#define COMING 1  /* it maps the others' shards */
#define LIVES 2
#define DRAINED 3 /* in an update, reads nothing */
#define EACH(index) for (index : 0 .. RANKS - 1)

byte state[RANKS], generation[RANKS], got[RANKS], mapped[RANKS]; /* mapped: 255 where generations were mixed */
byte deaths, updates, written;
bool reading[RANKS], updating, broken;
hidden byte i;

#define FOR_ALL(what) (what(0) && what(1) && what(RANKS - 1))
#define LIVING(rank) (state[rank] == LIVES || state[rank] == DRAINED)
#define SOMEBODY (LIVING(0) || LIVING(1) || LIVING(RANKS - 1))
#define STILL(rank) (state[rank] != LIVES)
#define WROTE(rank) (written & (1 << (rank)))
#ifdef MUTANT_DEAD_SOURCE
#define SOURCE(rank) true
#elif defined(MUTANT_COUNTED_EARLY)
#define SOURCE(rank) (state[rank] != GONE)
#else
#define SOURCE(rank) LIVING(rank)
#endif
#define HAS_WRITTEN(rank) (WROTE(rank) || !LIVING(rank))

inline end_update()
{
	updating = false;
	written = 0;
	EACH(i) {
		if
		:: state[i] == DRAINED -> state[i] = LIVES; mapped[i] = generation[i]
		:: else
		fi
	}
	i = 0
}

inline leave(rank) { state[rank] = GONE; reading[rank] = false; got[rank] = 0; mapped[rank] = 0 }

active [RANKS] proctype rank()
{
	state[_pid] = LIVES;
	do
	:: d_step { state[_pid] == LIVES && !broken && !reading[_pid] -> reading[_pid] = true }
	:: d_step { reading[_pid] ->
		    EACH(i) { assert(broken || generation[i] == mapped[_pid]) } /* a pass sees one generation */
		    i = 0; reading[_pid] = false }
	:: d_step { state[_pid] != GONE && deaths < DEATHS -> /* killed, or it leaves */
#ifndef MUTANT_NOT_BROKEN
		    if :: written && state[_pid] != COMING -> broken = true :: else fi;
#endif
		    leave(_pid); deaths++ }
	:: d_step { state[_pid] == GONE && !broken && SOMEBODY -> state[_pid] = COMING; mapped[_pid] = generation[0] }
	:: d_step { state[_pid] == COMING && got[_pid] < RANKS && SOMEBODY ->
		    if :: generation[got[_pid]] != mapped[_pid] -> mapped[_pid] = 255 :: else fi;
		    got[_pid]++ }
	:: d_step { state[_pid] == COMING && got[_pid] == RANKS && !broken -> state[_pid] = LIVES; got[_pid] = 0 }
	/* An update: its first agreement; each drains; the second; each writes; the third. */
	:: d_step { state[_pid] == LIVES && !updating && updates < UPDATES && !broken && FOR_ALL(SOURCE) ->
		    updating = true; updates++ }
	:: d_step { state[_pid] == LIVES && updating && !reading[_pid] -> state[_pid] = DRAINED }
	:: d_step { state[_pid] == DRAINED && !WROTE(_pid) && !broken && FOR_ALL(STILL) && (written || FOR_ALL(SOURCE)) ->
		    written = written | (1 << _pid); generation[_pid]++ }
	:: d_step { state[_pid] == DRAINED && written && !broken && FOR_ALL(HAS_WRITTEN) -> end_update() }
#ifndef MUTANT_NO_DEADLINE
	:: d_step { state[_pid] == DRAINED && !written -> end_update() }
	:: d_step { state[_pid] == DRAINED && written -> broken = true; end_update() }
	:: d_step { state[_pid] == COMING && (broken || !SOMEBODY) -> leave(_pid) }
#endif
	/* It calls no more: nobody starts it again, or it stands still. */
	:: !reading[_pid] && (state[_pid] == GONE || state[_pid] == LIVES) -> break
	od
}

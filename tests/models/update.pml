/* SPDX-License-Identifier: Apache-2.0
 *
 * update.pml - the update under agreements, on one-sided transports: RANKS ranks, each the source of one shard and the
 * reader of all, any of which dies at any step or is late in any agreement.
 *
 * An agreement happens for all living ranks or for none: the first rank past its deadline, or the end of one that is
 * in it, ends it for all. So what has to hold is what lies between agreements: who reads, who writes.
 */
#define EACH(index) for (index : 0 .. RANKS - 1)
#define PASSING 0
#define BEGIN 1    /* waits in the first agreement */
#define DRAINING 2 /* past it: finishes its reads */
#define READY 3    /* waits in the second */
#define UPDATING 4 /* past it: may write its shard */
#define WRITTEN 5  /* waits in the third */

byte phase[RANKS], generation[RANKS], reading[RANKS], writing, seen[RANKS], updates;
bool dead[RANKS], fetching[RANKS], broken; /* broken: an update ended midway, and no pass may begin */
hidden byte i;

#define NOBODY 255
#define IN_ALL(what) (IN(0, what) && IN(1, what) && (RANKS < 3 || IN(RANKS - 1, what)))
#define IN(rank, what) (dead[rank] || phase[rank] == what)
#define ANY_DEAD (dead[0] || dead[1] || dead[RANKS - 1])

inline all_to(next)
{
	EACH(i) { if :: !dead[i] -> phase[i] = next :: else fi }
	i = 0
}

active [RANKS] proctype rank()
{
	byte source;

	do
	:: dead[_pid] -> break
	/* A pass: shards are read one after the other, and all are of one generation. */
	:: !dead[_pid] && phase[_pid] == PASSING && reading[_pid] == 0 && !broken ->
		d_step { phase[_pid] == PASSING && !broken && !dead[_pid]; reading[_pid] = 1; seen[_pid] = generation[0];
			 assert(!(writing & 1)) }
	:: !dead[_pid] && reading[_pid] ->
		atomic {
			source = reading[_pid];
			if
			:: dead[_pid]
			:: !dead[_pid] && source == RANKS -> reading[_pid] = 0
			:: else ->
				assert(!(writing & (1 << source))); /* a view that is overwritten */
				assert(generation[source] == seen[_pid]); /* a mixed generation */
				reading[_pid] = source + 1
			fi;
			source = 0
		}
	:: d_step { !dead[_pid] && phase[_pid] == PASSING && updates < UPDATES && !reading[_pid] && !broken ->
		    phase[_pid] = BEGIN }
	/* A fetch of the rule, which goes on behind the program: of the next rank's shard. */
	:: d_step { !dead[_pid] && phase[_pid] == PASSING && !broken && !fetching[_pid] -> fetching[_pid] = true }
	:: d_step { fetching[_pid] -> assert(!(writing & (1 << ((_pid + 1) % RANKS)))); fetching[_pid] = false }
	/* The first agreement. */
	:: d_step { !dead[_pid] && phase[_pid] == BEGIN && IN_ALL(BEGIN) ->
#ifdef MUTANT_ONE_AGREEMENT
		    all_to(UPDATING)
#else
		    if :: ANY_DEAD -> all_to(PASSING); updates = UPDATES :: else -> all_to(DRAINING) fi
#endif
		  }
	:: d_step { !dead[_pid] && phase[_pid] == DRAINING && !fetching[_pid] -> phase[_pid] = READY }
	/* The second. A source that is dead cannot write: refused. */
	:: d_step { !dead[_pid] && phase[_pid] == READY && IN_ALL(READY) ->
		    if
#ifndef MUTANT_DEAD_SOURCE
		    :: ANY_DEAD -> all_to(PASSING); updates = UPDATES
		    :: !ANY_DEAD -> all_to(UPDATING)
#else
		    :: true -> all_to(UPDATING)
#endif
		    fi }
	:: d_step { !dead[_pid] && phase[_pid] == UPDATING && !(writing & (1 << _pid)) ->
		    writing = writing | (1 << _pid) }
	:: d_step { !dead[_pid] && phase[_pid] == UPDATING && (writing & (1 << _pid)) ->
		    writing = writing & (255 - (1 << _pid)); generation[_pid]++; phase[_pid] = WRITTEN }
	/* The third: all have written, or the series is of no use until it is loaded again. */
#ifdef MUTANT_EARLY_PASS
	:: d_step { !dead[_pid] && phase[_pid] == WRITTEN -> phase[_pid] = PASSING; updates = UPDATES }
#else
	:: d_step { !dead[_pid] && phase[_pid] == WRITTEN && IN_ALL(WRITTEN) ->
		    if
#ifndef MUTANT_DEAD_SOURCE
		    :: ANY_DEAD -> broken = true
		    :: !ANY_DEAD
#else
		    :: true
#endif
		    fi;
		    updates++; all_to(PASSING) }
#endif
#ifndef MUTANT_NO_DEADLINE
	/* The deadline of an agreement that some rank is not in: it has not happened, for anybody. */
	:: d_step { !dead[_pid] && phase[_pid] == BEGIN && !IN_ALL(BEGIN) -> phase[_pid] = PASSING; updates = UPDATES }
	:: d_step { !dead[_pid] && phase[_pid] == READY && !IN_ALL(READY) -> all_to(PASSING); updates = UPDATES }
	:: d_step { !dead[_pid] && phase[_pid] == WRITTEN && !IN_ALL(WRITTEN) -> broken = true; phase[_pid] = PASSING }
#endif
	:: d_step { !dead[_pid] && !ANY_DEAD -> dead[_pid] = true; reading[_pid] = 0; fetching[_pid] = false }
	/* It does not come any more, and does not die either. */
	:: !dead[_pid] && (phase[_pid] == PASSING || phase[_pid] == DRAINING) && !reading[_pid] -> break
	od
}

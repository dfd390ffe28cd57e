/* SPDX-License-Identifier: Apache-2.0
 *
 * ring.pml - the windows of one rank: the rule, captures and the tail rule of docs/design.md, any call at any time.
 *
 * Of the caller: N layers, WINDOWS, HORIZON, SLOTS (window of each layer, 255: stored here). A transfer lands, fails, or
 * (its source is dead) never does. A simulation prints each call and what every window must hold after it, for
 * test_ring_model. Each MUTANT_ is a fault that Spin has to find.
 */
#define NONE 255

mtype = { REACH, RELEASE, WAIT, JOIN, RESTART, PREPARE, CAPTURE, RESET, FAIL };

byte slot[N] = SLOTS;
byte holds[WINDOWS], outside[WINDOWS];
bool viewed[WINDOWS], tail[WINDOWS], seen[WINDOWS], viewed_outside[WINDOWS];
byte position, position_outside, waits = NONE;
bool passed, captured, ended, passed_outside, ended_outside, source_dead;
hidden byte w, p, d, from, first, last, result;

#define EACH(index, count) for (index : 0 .. (count) - 1)
#define IS_LEFT(window, wanted) (tail[window] && (captured || ended) && (wanted) < position + passed)

inline clear(window) { holds[window] = NONE; viewed[window] = false }

inline empty_tail()
{
#ifndef MUTANT_TAIL_KEPT
	EACH(w, WINDOWS) { if :: tail[w] -> clear(w) :: else fi }
#else
	skip
#endif
}

inline end_views(except)
{
	EACH(w, WINDOWS) { if :: holds[w] != except -> viewed[w] = false :: else fi }
}

inline find_tail()
{
	EACH(w, WINDOWS) {
		clear(w);
		first = NONE;
		EACH(p, N) {
			if
			:: slot[p] == w -> last = p; if :: first == NONE -> first = p :: else fi
			:: else
			fi
		}
		d = first + N - last - 1;
		d = (d < HORIZON -> d : HORIZON);
		tail[w] = (first != last && 2 * first > d)
	}
}

inline fetch()
{
#ifndef MUTANT_VIEW_OVERWRITTEN
	if
	:: viewed[w]
	:: else ->
#endif
		assert(!viewed[w]); /* I1 */
		assert(!IS_LEFT(w, p)); /* I18 */
		holds[w] = p
#ifndef MUTANT_VIEW_OVERWRITTEN
	fi
#endif
}

/* The layers from the program on: the first of each window is what it wants. */
inline start_fetches()
{
	from = (position + passed) % N;
	EACH(w, WINDOWS) { seen[w] = false }
	EACH(d, N) {
		p = (from + d) % N;
		w = slot[p];
		if
		:: w == NONE || d > HORIZON
		:: else ->
			if
			:: seen[w] || holds[w] == p
#ifndef MUTANT_TAIL_FETCHED
			:: !seen[w] && holds[w] != p && IS_LEFT(w, p)
			:: !seen[w] && holds[w] != p && !IS_LEFT(w, p) -> fetch()
#else
			:: !seen[w] && holds[w] != p -> fetch()
#endif
			fi;
#ifdef MUTANT_LOST_WINDOW
			if :: viewed[w] -> break :: else fi;
#endif
			seen[w] = true
		fi
	}
}

/* I2, I4, I7, I18. */
inline check()
{
	EACH(w, WINDOWS) {
		assert(holds[w] == NONE || slot[holds[w]] == w);
		d = 0;
		do
		:: slot[(from + d) % N] != w -> d++
		:: else -> break
		od;
		p = (from + d) % N;
		assert(viewed[w] || holds[w] == p || d > HORIZON || IS_LEFT(w, p))
	}
}

/* I18, where a replay or a capture begins. */
inline check_tail() { EACH(w, WINDOWS) { assert(!tail[w] || holds[w] == NONE) } }

inline tell(name, argument)
{
	printf("call %e %d %d", name, argument, result);
	EACH(w, WINDOWS) { printf(" %d/%d", holds[w], viewed[w]) }
	printf("\n")
}

inline after(name, argument)
{
	start_fetches();
	check();
	tell(name, argument);
	p = 0; d = 0; from = 0; first = 0; last = 0; w = 0; result = 0
}

inline reach(layer) { end_views(layer); position = layer; passed = false; ended = false }

/* 0: stored here, 1: held, 2: a miss, 3: busy. */
inline begin_wait(layer)
{
	if
	:: slot[layer] == NONE -> result = 0
	:: else ->
		w = slot[layer];
		if
		:: holds[w] != layer && viewed[w] -> result = 3
		:: else ->
			result = (holds[w] == layer -> 1 : 2);
			holds[w] = layer;
			viewed[w] = true;
			waits = w
		fi
	fi
}

inline save()
{
	EACH(w, WINDOWS) { outside[w] = holds[w]; viewed_outside[w] = viewed[w] }
	position_outside = position; passed_outside = passed; ended_outside = ended
}

inline restore()
{
	EACH(w, WINDOWS) {
		holds[w] = outside[w]; viewed[w] = viewed_outside[w]; outside[w] = NONE; viewed_outside[w] = false
	}
	position = position_outside; passed = passed_outside; ended = ended_outside;
	position_outside = 0; passed_outside = false; ended_outside = false
}

active proctype rank()
{
	byte layer;

	d_step {
		find_tail();
		EACH(w, WINDOWS) { outside[w] = NONE }
		reach(0);
		after(REACH, 0)
	}
	do
	:: waits == NONE ->
		select(layer : 0 .. N - 1);
		if
		:: d_step { reach(layer); after(REACH, layer) }
		:: d_step {
			if
			:: slot[layer] != NONE && holds[slot[layer]] == layer -> viewed[slot[layer]] = false
			:: else
			fi;
			if :: layer == position -> passed = true :: else fi;
			after(RELEASE, layer)
		   }
		:: d_step { begin_wait(layer); tell(WAIT, layer); result = 0; w = 0 }
		:: d_step { end_views(NONE); passed = true; after(JOIN, 0) }
		:: d_step { end_views(NONE); position = 0; passed = false; ended = false; after(RESTART, 0) }
		:: d_step {
			end_views(NONE); position = N - 1; passed = true; ended = true; empty_tail();
			after(PREPARE, 0);
			check_tail(); w = 0
		   }
		:: d_step { !captured -> save(); captured = true; empty_tail(); check_tail(); tell(CAPTURE, 0); w = 0 }
		:: d_step { captured -> captured = false; restore(); tell(CAPTURE, 0); w = 0 }
		:: d_step {
			EACH(w, WINDOWS) { clear(w) }
			position = 0; passed = false; ended = false;
			after(RESET, 0)
		   }
		fi;
		layer = 0
	:: waits != NONE && !source_dead ->
		d_step { assert(viewed[waits]); waits = NONE }
	:: waits != NONE && !source_dead -> /* its transfer failed */
		d_step { clear(waits); tell(FAIL, waits); waits = NONE; w = 0 }
#ifndef MUTANT_NO_DEADLINE
	:: waits != NONE -> waits = NONE /* the deadline */
#endif
	:: !source_dead && waits != NONE -> source_dead = true
	:: source_dead && waits == NONE -> source_dead = false /* it came back */
	od
}

/* SPDX-License-Identifier: Apache-2.0
 *
 * rules.c - what the ranks of a cell must see. By classes: is the call made by all together, can the fault be met in
 * it, does it end the victim.
 */
#include "matrix.h"

#define TRANSPORT(name, spec, rejoin, collective, device) {name, spec, rejoin, collective, device},
#define PHASE(name, text, order, steps, together)         {text, order, steps, together},
#define FAULT(name, text)                                 text,
const struct matrix_transport matrix_transports[] = {MATRIX_TRANSPORTS(TRANSPORT)};
const int matrix_n_transports = sizeof matrix_transports / sizeof matrix_transports[0];
const struct matrix_step matrix_phases[PHASES] = {MATRIX_PHASES(PHASE)};
const char *const matrix_faults[FAULTS] = {MATRIX_FAULTS(FAULT)};

static int calls_back(enum matrix_phase phase)
{
	return phase == PHASE_COMMIT || phase == PHASE_END;
}

static int allocates(enum matrix_phase phase)
{
	return phase == PHASE_GROUP || phase == PHASE_SERIES || phase == PHASE_BEGIN || phase == PHASE_VERIFY ||
	       phase == PHASE_RETURN;
}

const char *matrix_not_applicable(const struct cell *cell)
{
	if ((cell->fault == FAULT_CALLBACK_FAILS || cell->fault == FAULT_CALLBACK_BLOCKS) && !calls_back(cell->phase))
		return "the call has no callback";
	if (cell->phase == PHASE_RETURN && cell->transport->rejoin != LSHARD_REJOIN_ALLOW)
		return "ranks cannot come back";
	if (cell->phase == PHASE_RETURN && cell->fault == FAULT_KILLED_BEFORE)
		return "it is killed before it comes back in every cell of this phase";
	if (cell->phase == PHASE_RETURN && cell->fault == FAULT_FORK)
		return "there is no group yet that a child could have";
	if (cell->phase == PHASE_GROUP && cell->fault == FAULT_FORK)
		return "there is no group yet that a child could have";
	if (cell->fault == FAULT_NO_MEMORY && !allocates(cell->phase) && !cell->transport->collective)
		return "the call allocates nothing";
	if (cell->fault == FAULT_FILES && cell->transport->on_device)
		return "a driver's memory is no file; the stub's is";
	if (cell->phase == PHASE_LEAVE && (cell->fault == FAULT_NO_MEMORY || cell->fault == FAULT_DESCRIPTORS ||
					   cell->fault == FAULT_FILES || cell->fault == FAULT_SPACE))
		return "the call needs nothing";
	return NULL;
}

int rule_has(const lshard_status *statuses, int n, lshard_status status)
{
	for (int i = 0; i < n; i++)
		if (statuses[i] == status)
			return 1;
	return 0;
}

static void others_see(struct rule *rule, lshard_status status)
{
	rule->others[rule->n_others++] = status;
}

static void victim_sees(struct rule *rule, lshard_status status)
{
	rule->victims[rule->n_victims++] = status;
}

/* Is the call one that all make together, here? */
static int is_together(const struct cell *cell)
{
	return matrix_phases[cell->phase].together || (cell->transport->collective && cell->phase <= PHASE_DESTROY);
}

/* In step, what a rank has asked for may still wait for the others when it lets go of it; or it is through. */
static int may_be_through(const struct cell *cell)
{
	return cell->transport->collective && cell->phase == PHASE_DESTROY;
}

/*
 * A rank that is no more. Alone, the others notice nothing. In a call of all they are told who; those who needed it no
 * more are through. Where rank 0 never came, nobody has the place at which ranks meet, and waiting is all there is.
 */
static struct rule rule_of_killed(const struct cell *cell)
{
	struct rule rule = {.named = 1, .after_failure = GIVE_UP};

	if (!is_together(cell)) {
		others_see(&rule, LSHARD_OK);
		return rule;
	}
	others_see(&rule, LSHARD_ERR_PEER_FAILED);
	if (cell->phase == PHASE_GROUP) {
		others_see(&rule, LSHARD_ERR_TIMEOUT);
		rule.or_rank_0 = 1;
	}
	if (cell->fault == FAULT_KILLED_WITHIN || may_be_through(cell))
		others_see(&rule, LSHARD_OK);
	if (cell->transport->collective) {
		others_see(&rule, LSHARD_ERR_TRANSPORT); /* the caller's collective has failed, or never ends */
		others_see(&rule, LSHARD_ERR_CALLBACK);
		others_see(&rule, LSHARD_ERR_TIMEOUT);
		rule.named = 0; /* as far as callbacks.h says */
	}
	if (!cell->transport->collective && (cell->phase == PHASE_BEGIN || cell->phase == PHASE_VERIFY))
		rule.after_failure = GO_ON;
	return rule;
}

/* Whoever waits too long names who was waited for; nothing has changed, and the call may be made again. */
static struct rule rule_of_late(const struct cell *cell)
{
	struct rule rule = {.named = 1, .after_failure = cell->transport->collective ? GIVE_UP : RETRY};

	if (!is_together(cell)) {
		others_see(&rule, LSHARD_OK);
		victim_sees(&rule, LSHARD_OK);
		return rule;
	}
	others_see(&rule, LSHARD_ERR_TIMEOUT);
	victim_sees(&rule, LSHARD_ERR_TIMEOUT);
	if (cell->phase == PHASE_GROUP) { /* the others have given up by then */
		victim_sees(&rule, LSHARD_ERR_PEER_FAILED);
	}
	if (cell->transport->collective) {
		rule.named = 0;
		if (may_be_through(cell))
			others_see(&rule, LSHARD_OK);
		others_see(&rule, LSHARD_ERR_OUT_OF_STEP);
		victim_sees(&rule, LSHARD_ERR_OUT_OF_STEP);
		victim_sees(&rule, LSHARD_OK);
	}
	return rule;
}

static struct rule rule_of_callback(const struct cell *cell)
{
	struct rule rule = {.named = 1, .after_failure = cell->transport->collective ? GIVE_UP : RETRY};

	others_see(&rule, LSHARD_ERR_CALLBACK);
	victim_sees(&rule, LSHARD_ERR_CALLBACK);
	return rule;
}

/* It may have what it needs all the same; where not, all hear of it. */
static struct rule rule_of_want(const struct cell *cell)
{
	static const lshard_status told[] = {LSHARD_OK, LSHARD_ERR_NO_MEMORY, LSHARD_ERR_SYSTEM};
	struct rule rule = {.named = 1, .after_failure = cell->transport->collective ? GIVE_UP : RETRY};

	for (int i = 0; i < 3; i++) {
		victim_sees(&rule, told[i]);
		others_see(&rule, told[i]);
	}
	if (!is_together(cell) && cell->phase != PHASE_RETURN) {
		rule.n_others = rule.n_victims = 1;
		return rule;
	}
	if (cell->phase == PHASE_RETURN) {
		rule.n_others = 1;
		return rule;
	}
	others_see(&rule, LSHARD_ERR_PEER_FAILED);
	others_see(&rule, LSHARD_ERR_TIMEOUT); /* before it could connect to anybody */
	return rule;
}

static struct rule rule_of_nothing(void)
{
	struct rule rule = {.after_failure = GIVE_UP};

	others_see(&rule, LSHARD_OK);
	victim_sees(&rule, LSHARD_OK);
	return rule;
}

struct rule matrix_rule(const struct cell *cell)
{
	switch (cell->fault) {
	case FAULT_KILLED_BEFORE:
	case FAULT_KILLED_WITHIN:
		return rule_of_killed(cell);
	case FAULT_STOPPED_LONG:
	case FAULT_CALLBACK_BLOCKS:
		return rule_of_late(cell);
	case FAULT_CALLBACK_FAILS:
		return rule_of_callback(cell);
	case FAULT_NO_MEMORY:
	case FAULT_DESCRIPTORS:
	case FAULT_FILES:
	case FAULT_SPACE:
		return rule_of_want(cell);
	case FAULT_STOPPED_SHORTLY:
	case FAULT_GARBAGE:
	case FAULT_FORK:
	case FAULT_CLOCK:
	case FAULTS:
		break;
	}
	return rule_of_nothing();
}

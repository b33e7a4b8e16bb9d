import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import fedsim
from fedsim.rng import Randomness
from fedsim.simulation import Simulation
from fedsim.simulation.tries import SPARE, TOGETHER, Tries
from fedsim.strategies.fedavg import FedAvg


@given(st.lists(st.tuples(st.integers(1, 3 * TOGETHER), st.integers(1, 16)), min_size=1, max_size=12))
def test_tries_drawn_together_are_those_that_each_pick_would_draw_alone_in_whatever_order_picks_come(asked):
    tries = Tries(Randomness(5), clients=1000)
    for pick, k in asked:
        alone = Randomness(5)("pick by trial", pick)
        assert tries.first(pick, k) == [alone.nth_integer(1000, n) for n in range(k + SPARE)]


def test_picks_that_follow_each_other_are_drawn_for_once():
    drawn = []

    class Counting(Randomness):
        def __call__(self, purpose, *ids):
            drawn.append(np.size(ids[0]))
            return super().__call__(purpose, *ids)

    tries = Tries(Counting(5), clients=1000)
    for pick in range(7, 7 + TOGETHER // (2 + SPARE)):
        tries.first(pick, 1 + pick % 2)
    assert drawn == [TOGETHER // (2 + SPARE)]


def expected_pick(sim: Simulation, pick: int, k: int) -> list[int] | None:
    # by the definition: the first k different idle clients of the 4 k + 8 that a pick tries, ascending
    tried = sim.randomness("pick by trial", pick).integers(sim.clients, 4 * k + 8)
    idle = [each for each in dict.fromkeys(tried.tolist()) if not sim.busy[each] and sim.online[each]]
    return sorted(idle[:k]) if len(idle) >= k else None


def test_a_pick_of_few_takes_the_first_idle_clients_it_tries_however_few_are_idle():
    seen = {"by trial": 0, "given up": 0}

    class Picky(FedAvg):
        def settle(self, fed):
            sim: Simulation = fed
            if not sim.in_flight:
                for number in range(300):
                    k = (1, 1, 9, 1, 3, 16)[number % 6]  # what was drawn ahead is now wider, now narrower than needed
                    k = min(k, sim.clients // 4)
                    wanted = expected_pick(sim, sim._picks + 1, k)
                    chosen = fed.pick(k)
                    if wanted is not None:
                        assert chosen.tolist() == wanted
                        seen["by trial"] += 1
                    else:
                        assert len(set(chosen.tolist())) == min(k, len(sim.idle()))
                        seen["given up"] += 1
                    if number % 10 == 0 and len(sim.idle()):
                        fed.dispatch(sim.idle()[: -(-len(sim.idle()) // 4)])
            fed.stop("seen")

    fedsim.simulate(Picky(), fedsim.ScheduleOnly(), stop=fedsim.Stop(rounds=1), clients=80, cohort=5, eval_every=0)
    assert min(seen.values()) > 50

"""Rounding to a grid, and ADMM of which only multiples travel: bias, bytes, what both ends know, how near it comes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_every_strategy import QUADRATIC, StopAfter, StoppedError, hashes, run

import fedsim
from fedsim import ConfigError, LocalSGD, Quadratic, Quantiser, Stop, System
from fedsim.rng import Randomness
from fedsim.strategies.fedadmm import FedADMM
from fedsim.system.compute import Lognormal
from fedsim.system.faults import Faults
from fedsim.vectors import Layout
from fedsim.wire import message_bytes

# ---- the grid ----------------------------------------------------------------------------------------


def test_rounding_goes_to_one_of_the_two_nearest_points_and_is_unbiased() -> None:
    quantiser, draws = Quantiser(0.25), 40_000
    x = torch.tensor([-1.3, -0.25, 0.0, 0.01, 0.24, 3.125], dtype=torch.float64)
    uniform = Randomness(0)("rounding").uniform((draws, 6))
    values = quantiser.values(quantiser.codes(x.expand(draws, 6), uniform), torch.float64)
    assert ((values - x).abs() < 0.25).all()
    share = (x / 0.25) - (x / 0.25).floor()
    spread = 0.25 * (share * (1 - share)).sqrt()
    assert ((values.mean(dim=0) - x).abs() <= 4.5 * spread / draws**0.5).all()
    torch.testing.assert_close(values.std(dim=0), spread, rtol=0.03, atol=1e-12)
    assert (values[:, 1:3] == x[1:3]).all()  # multiples stay
    assert (values[:, 2:] >= 0).all()  # and so does the sign


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_bytes_are_what_the_type_says_and_too_large_a_number_is_an_error(bits: int) -> None:
    quantiser, layout = Quantiser(0.5, bits), Layout.flat(7)
    assert message_bytes([quantiser.spec(layout)], layout) == 7 * bits // 8
    most = 2 ** (bits - 1) - 1
    edge = torch.tensor([most * 0.5, -most * 0.5], dtype=torch.float64)
    for codes in (quantiser.nearest(edge), quantiser.codes(edge, np.full(2, 0.5))):
        assert codes.tolist() == [most, -most]
        assert codes.element_size() == bits // 8
        assert torch.equal(quantiser.values(codes, torch.float64), edge)
    for wrong in (edge + 1, edge - 1, edge * torch.nan):
        with pytest.raises(ValueError, match=rf"{bits} bits in steps of 0\.5 hold up to"):
            quantiser.nearest(wrong)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"^bits=12: must be 8, 16 or 32"):
        FedADMM(grid=0.1, bits=12)
    with pytest.raises(ConfigError, match=r"^grid=0: must be a number > 0"):
        FedADMM(grid=0)


# ---- ADMM over it ------------------------------------------------------------------------------------


def simulate(strategy: fedsim.Strategy, rounds: int, **more: Any) -> fedsim.Run:
    system = System(Lognormal(jitter=0.3), faults=Faults(more.pop("dropout", 0.0), "any"))
    return fedsim.simulate(strategy, Quadratic(), system, stop=Stop(rounds=rounds), clients=10, cohort=4, **more)


def test_a_round_costs_the_bytes_of_the_codes_both_ways() -> None:
    for bits in (16, 32):
        events = simulate(FedADMM(LocalSGD(lr=0.2, steps=3), 1.0, grid=0.01, bits=bits), 6).events
        done = events[events.outcome == "applied"]
        assert len(done) == 24
        assert (done.up_bytes == 10 * bits // 8).all()
        assert (done.down_bytes == 10 * bits // 8).all()


def test_all_that_travels_is_on_the_grid_and_the_server_knows_every_augmented_model() -> None:
    grid, rho, gaps = 0.03, 0.5, []
    strategy = FedADMM(LocalSGD(lr=0.2, steps=5), rho, grid=grid, over_selection=1.5, stragglers="late")

    def off_grid(x: torch.Tensor) -> float:
        return float((x / grid - (x / grid).round()).abs().max())

    def look(sim: Any) -> None:
        if sim.version > len(gaps):
            joined = {i for i, each in sim.kept("joined").items() if each}
            model, dual = sim.kept("model"), sim.kept("dual")
            assert all(max(off_grid(model[i]), off_grid(dual[i] / rho)) < 1e-9 for i in joined)
            assert off_grid(sim.model) < 1e-9
            own = [model[i] + dual[i] / rho if i in joined else strategy.initial for i in range(10)]
            gaps.append(float((torch.stack(own).mean(dim=0) - strategy.theta).norm()))
            assert float((strategy.theta - sim.model).abs().max()) < grid

    done = simulate(strategy, 60, dropout=0.2, observer=look)
    assert (done.events.outcome == "late").any()
    assert len(gaps) == done.summary["version"]
    assert max(gaps) < 1e-11


def test_the_error_is_of_the_order_of_the_grid_and_vanishes_with_it() -> None:
    """Known for a consensus quadratic: 0.9 % at a grid of 0.01, 8 % at 0.1."""

    def error(grid: float | None) -> float:
        strategy = FedADMM(LocalSGD(lr=0.4, steps=4), 1.0, grid=grid, bits=32)
        done = simulate(strategy, 160, eval_every=5)
        problem = Quadratic()
        problem.prepare(10, Randomness(0))
        tail = done.metrics.distance.to_numpy()[-12:]
        return float(np.sqrt(tail.mean()) / np.linalg.norm(problem.optimum))

    coarse, fine, finest, none = error(0.1), error(0.01), error(1e-7), error(None)
    assert 0.005 < coarse < 0.1
    assert 5 < coarse / fine < 20
    assert finest < 1e-6
    assert none < 1e-7


def test_a_grid_too_fine_to_see_changes_nothing_else() -> None:
    rule = LocalSGD(lr=0.2, steps=4)
    plain, fine = (simulate(FedADMM(rule, 0.5, grid=grid, bits=32), 20).model["x"] for grid in (None, 1e-8))
    torch.testing.assert_close(fine, plain, rtol=0, atol=1e-6)
    assert not torch.equal(fine, plain)


def test_a_run_over_the_grid_that_is_stopped_ends_with_the_same_bits(tmp_path: Any) -> None:
    whole, parts, grid = tmp_path / "whole", tmp_path / "parts", ["strategy.grid=0.01", "local=sam"]
    run("fedadmm", *QUADRATIC, *grid, out=whole)
    with pytest.raises(StoppedError):
        run("fedadmm", *QUADRATIC, *grid, out=parts, observer=StopAfter(12))
    run("fedadmm", *QUADRATIC, *grid, out=parts, resume=True)
    assert hashes(parts) == hashes(whole)


def test_too_few_bits_end_the_run_with_one_line() -> None:
    with pytest.raises(fedsim.SimulationError, match=r"8 bits in steps of 0\.001 hold up to 0\.127"):
        simulate(FedADMM(LocalSGD(lr=0.2, steps=4), 0.5, grid=0.001, bits=8), 3)


class Away(Quadratic):
    """Models begin at 5."""

    def initial(self) -> torch.Tensor:
        return super().initial() + 5.0


def test_a_grid_that_the_first_model_does_not_fit_is_refused_before_anything_is_written(tmp_path: Any) -> None:
    strategy = FedADMM(grid=0.01, bits=8)
    with pytest.raises(ConfigError, match=r"^strategy\.grid=0\.01: too fine .* 8 bits in .* hold up to 1\.27: 5$"):
        fedsim.simulate(strategy, Away(), stop=Stop(rounds=1), clients=4, cohort=2, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_that_grows_out_of_the_grid_ends_the_run_with_one_line() -> None:
    """Every client's codes fit; a server step of 100 makes theta larger than any of them."""
    strategy = FedADMM(LocalSGD(lr=0.2, steps=1), 1.0, server_lr=100.0, grid=0.1, bits=8)
    with pytest.raises(fedsim.SimulationError, match=r"^FedADMM cannot send its model: 8 bits in steps of 0\.1 hold"):
        simulate(strategy, 3)

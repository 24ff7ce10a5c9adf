"""The solvers against numbers of the official code (tests/data/wan21_golden.json) and against diffusers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from wan21.errors import UsageError
from wan21.samplers import Sampler, make_sampler, unipc
from wan21.samplers.schedule import Scalar
from wan21.samplers.unipc import corrector_weights

SOLVERS = ("unipc", "dpm++")
GOLDEN_PREFIX = {"unipc": "unipc", "dpm++": "dpmpp"}
SHIFTS = (1.0, 3.0, 5.0, 8.0, 16.0)

# The golden runs were made on another machine, whose log and exp may round otherwise (measured here: at most 1.2e-7).
GOLDEN_TOLERANCE = 1e-6

# On one machine DPM-Solver++ repeats diffusers' operations one by one. UniPC solves two equations in closed form, not
# by LAPACK, and differs by a unit in the last place of the weights (measured: at most 3.6e-7 on latents up to 4.1).
DIFFUSERS_TOLERANCE = {"unipc": 1e-6, "dpm++": 0.0}

Model = Callable[[Tensor, int], Tensor]


def run(sampler: Sampler, sample: Tensor, model: Model) -> list[Tensor]:
    path = []
    for timestep in sampler.timesteps:
        sample = sampler.step(model(sample, timestep), sample)
        path.append(sample)
    return path


def closed_form_velocity(sample: Tensor, timestep: int) -> Tensor:
    return torch.sin(3 * sample) + 0.001 * timestep


def latent_noise() -> Tensor:
    return torch.randn(1, 16, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def fake_model() -> Model:
    """Velocity away from made-up data in (-1, 1): mixes channels, bends, depends on the timestep."""
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) / 4

    def model(sample: Tensor, timestep: int) -> Tensor:
        return sample - torch.tanh(torch.einsum("dc,bcthw->bdthw", mix, sample) + timestep / 1000)

    return model


@pytest.mark.parametrize("solver", SOLVERS)
def test_schedules_equal_the_official_ones(golden: dict[str, Any], solver: str) -> None:
    for entry in golden["schedules"]:
        sampler = make_sampler(solver, num_steps=entry["steps"], shift=entry["shift"])
        prefix = GOLDEN_PREFIX[solver]
        assert entry[f"{prefix}_timesteps"] == sampler.timesteps
        assert np.float32(entry[f"{prefix}_sigmas"]).tolist() == sampler.sigmas


@pytest.mark.parametrize("solver", SOLVERS)
def test_runs_on_a_closed_form_velocity_equal_the_official_ones(golden: dict[str, Any], solver: str) -> None:
    prefix = GOLDEN_PREFIX[solver]
    num_paths = 0
    for entry in golden["sampler_runs"]["runs"]:
        sampler = make_sampler(solver, num_steps=entry["steps"], shift=entry["shift"])
        path = run(sampler, torch.tensor(golden["sampler_runs"]["x0"]), closed_form_velocity)
        torch.testing.assert_close(path[-1], torch.tensor(entry[f"{prefix}_final"]), atol=GOLDEN_TOLERANCE, rtol=0)
        if f"{prefix}_path" in entry:
            expected = torch.tensor(entry[f"{prefix}_path"])
            torch.testing.assert_close(torch.stack(path), expected, atol=GOLDEN_TOLERANCE, rtol=0)
            num_paths += 1
    assert num_paths > 0


def test_products_rounded_as_upstreams_give_its_runs_on_a_gpu(golden: dict[str, Any]) -> None:
    num_differing = 0
    for entry in golden["sampler_runs"]["runs"]:
        sampler = make_sampler("unipc", num_steps=entry["steps"], shift=entry["shift"], rounds_products=True)
        path = run(sampler, torch.tensor(golden["sampler_runs"]["x0"]), closed_form_velocity)
        final = torch.tensor(entry["unipc_cuda_autocast_emulated_final"])
        torch.testing.assert_close(path[-1], final, atol=GOLDEN_TOLERANCE, rtol=0)
        num_differing += bool((final - torch.tensor(entry["unipc_final"])).abs().max() > 2 * GOLDEN_TOLERANCE)
    assert num_differing == len(golden["sampler_runs"]["runs"])


def diffusers_unipc(num_steps: int, shift: float) -> Any:
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    # Without explicit sigmas, diffusers since 0.37 makes another grid than the official code.
    scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0, num_steps + 1)[:-1])
    return scheduler


def diffusers_dpmpp(num_steps: int, shift: float) -> Any:
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(num_steps)
    even = np.linspace(1, 0, num_steps + 1)[:-1]
    sigmas = shift * even / (1 + (shift - 1) * even)
    scheduler.timesteps = torch.from_numpy((sigmas * 1000).astype(np.int64))
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    return scheduler


def largest_difference_from_diffusers(sampler: Sampler, scheduler: Any) -> float:
    """At any step of a run from the same noise."""
    model = fake_model()
    sample = latent_noise()
    expected = []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample, int(timestep)), timestep, sample, return_dict=False)[0]
        expected.append(sample)
    actual = run(sampler, latent_noise(), model)
    return max((a - b).abs().max().item() for a, b in zip(actual, expected, strict=True))


# Diffusers 0.42 with numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("solver", SOLVERS)
def test_runs_on_a_nonlinear_model_equal_diffusers(solver: str, num_steps: int, shift: float) -> None:
    scheduler = {"unipc": diffusers_unipc, "dpm++": diffusers_dpmpp}[solver](num_steps, shift)
    sampler = make_sampler(solver, num_steps=num_steps, shift=shift)
    assert scheduler.timesteps.tolist() == sampler.timesteps
    assert scheduler.sigmas.tolist() == sampler.sigmas

    assert largest_difference_from_diffusers(sampler, scheduler) <= DIFFUSERS_TOLERANCE[solver]


def test_unipc_differs_from_diffusers_only_by_how_two_equations_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    def solved_by_lapack(h: Scalar, r: Scalar) -> tuple[float, float]:
        e = unipc.expm1(-h)
        g1 = e / -h - Scalar(1)
        g2 = g1 / -h - Scalar(0.5)
        right = torch.tensor([float(g1 / e), float(Scalar(2) * g2 / e)])
        earlier, newest = torch.linalg.solve(torch.tensor([[1.0, 1.0], [float(r), 1.0]]), right).tolist()
        return earlier, newest

    monkeypatch.setattr(unipc, "corrector_weights", solved_by_lapack)
    sampler = make_sampler("unipc", num_steps=50, shift=5.0)
    assert largest_difference_from_diffusers(sampler, diffusers_unipc(50, 5.0)) == 0.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_gives_the_estimate_of_the_data(solver: str) -> None:
    sampler = make_sampler(solver, num_steps=1, shift=5.0)
    sample, velocity = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 3.0])
    torch.testing.assert_close(sampler.step(velocity, sample), sample - sampler.sigmas[0] * velocity)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("num_steps", "shift"), [(100, 16.0), (1000, 16.0), (1000, 0.5), (1000, 200.0)])
def test_many_steps_run_through_although_timesteps_repeat(solver: str, num_steps: int, shift: float) -> None:
    sampler = make_sampler(solver, num_steps=num_steps, shift=shift)
    path = run(sampler, torch.tensor([0.5, -1.25]), closed_form_velocity)
    assert num_steps == len(path)
    assert torch.isfinite(torch.stack(path)).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_straight_flow_is_followed_exactly(solver: str) -> None:
    # With a velocity that points from the data to the noise, each solver stays on the line between them.
    data, noise = torch.tensor([1.0, -2.0]), torch.tensor([0.3, 0.8])
    sampler = make_sampler(solver, num_steps=12, shift=5.0)
    start = sampler.sigmas[0] * noise + (1 - sampler.sigmas[0]) * data
    path = run(sampler, start, lambda _sample, _timestep: noise - data)
    for sigma, sample in zip(sampler.sigmas[1:], path, strict=True):
        torch.testing.assert_close(sample, sigma * noise + (1 - sigma) * data, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_too_many_is_an_error(solver: str) -> None:
    sampler = make_sampler(solver, num_steps=2, shift=5.0)
    final = run(sampler, torch.tensor([0.5]), closed_form_velocity)[-1]
    with pytest.raises(RuntimeError, match="step 3 of 2"):
        sampler.step(final, final)


@pytest.mark.parametrize("solver", SOLVERS)
def test_arguments_are_not_modified(solver: str) -> None:
    sampler = make_sampler(solver, num_steps=5, shift=5.0)
    sample = latent_noise()
    for timestep in sampler.timesteps:
        velocity = closed_form_velocity(sample, timestep)
        before = velocity.clone(), sample.clone()
        following = sampler.step(velocity, sample)
        assert torch.equal(before[0], velocity)
        assert torch.equal(before[1], sample)
        sample = following


@pytest.mark.parametrize(("solver", "most"), [("unipc", 3), ("dpm++", 1)])
def test_history_is_as_small_as_stated_and_gone_at_the_end(solver: str, most: int) -> None:
    sampler = make_sampler(solver, num_steps=6, shift=5.0)
    sample = torch.tensor([0.5])
    sampler.begin(sample)
    kept = [places_held(sampler)]
    for timestep in sampler.timesteps:
        sample = sampler.step(closed_form_velocity(sample, timestep), sample)
        kept.append(places_held(sampler))
    # In the same places from the beginning on, and gone with the last step.
    assert [most] * 6 + [0] == [len(places) for places in kept]
    assert len({place for places in kept for place in places}) == most


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_lone_step_needs_no_history(solver: str) -> None:
    sampler = make_sampler(solver, num_steps=1, shift=5.0)
    sampler.begin(torch.tensor([0.5]))
    assert places_held(sampler) == []


def places_held(sampler: Sampler) -> list[int]:
    """Where the tensors lie that a solver holds on to."""
    held = [tensor for value in vars(sampler).values() for tensor in (value if type(value) is list else (value,))]
    return [tensor.data_ptr() for tensor in held if isinstance(tensor, Tensor)]


@pytest.mark.parametrize("solver", SOLVERS)
def test_places_may_also_come_with_the_first_step(solver: str) -> None:
    paths = []
    for begins in (True, False):
        sampler = make_sampler(solver, num_steps=4, shift=5.0)
        if begins:
            sampler.begin(latent_noise())
        paths.append(torch.stack(run(sampler, latent_noise(), closed_form_velocity)))
    assert torch.equal(*paths)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_dry_run_on_fake_tensors_computes_the_same_scalars(solver: str) -> None:
    expected = make_sampler(solver, num_steps=5, shift=5.0)
    with FakeTensorMode():
        sampler = make_sampler(solver, num_steps=5, shift=5.0)
        path = run(sampler, torch.empty(1, 16, 2, 4, 4), lambda sample, _timestep: 2 * sample)
    assert expected.sigmas == sampler.sigmas
    assert expected._schedule.lambdas.tolist() == sampler._schedule.lambdas.tolist()
    assert {(1, 16, 2, 4, 4)} == {tuple(sample.shape) for sample in path}


def test_corrector_weights_solve_their_equations() -> None:
    h, r = 0.4, -1.3
    e = np.expm1(-h)
    g1 = e / -h - 1
    g2 = g1 / -h - 0.5
    expected = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([g1 / e, 2 * g2 / e]))
    # Float32 loses digits in g2: two steps that each subtract nearly equal numbers.
    np.testing.assert_allclose([float(w) for w in corrector_weights(Scalar(h), Scalar(r))], expected, atol=1e-5)


def test_half_precision_is_refused() -> None:
    sampler = make_sampler("unipc", num_steps=2, shift=5.0)
    with pytest.raises(ValueError, match=r"velocity\.dtype=torch\.float16"):
        sampler.step(torch.zeros(1, dtype=torch.float16), torch.zeros(1))


def test_an_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"sample_solver=euler.*unipc, dpm\+\+"):
        make_sampler("euler", num_steps=2, shift=5.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("shift", [1e9, 1e-60])
def test_a_shift_that_merges_noise_levels_is_refused(solver: str, shift: float) -> None:
    with pytest.raises(UsageError, match="equal in float32"):
        make_sampler(solver, num_steps=50, shift=shift)


def test_no_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="num_steps=0"):
        make_sampler("unipc", num_steps=0, shift=5.0)

"""``predictor_step``'s kernel beyond the registry's cases: its barrier among several programs, rows, limits, refusals."""

from __future__ import annotations

import golden
import pytest
import small
import torch
from compare import assert_as_accurate, relative_rmse, to_double
from kernel_checks import inputs, poisoned
from test_golden import make_world

from deltakern import backend, ops
from deltakern.cases import cases
from deltakern.models import Savings
from deltakern.ops import _triton
from deltakern.ops.kernels import predictor_step as kernels

TWO_CLIPS = next(c for c in cases("predictor_step", "tiny") if c.name == "two-clips")
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="schedules the programs of the interpreter")


def of_samples(samples, device, dtype=torch.float32):
    """The first case's arguments, for one clip of so many samples and two steps."""
    args, kwargs = inputs(TWO_CLIPS, dtype, device)
    noise = torch.randn(1, samples, 2, 20, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    return [noise, args[1][:, :1], args[2][:, :1], args[3][:1, :2], *args[4:]], kwargs


def assert_accurate(args, kwargs):
    plain = ops.predictor_step.reference(*args, **kwargs)
    truth = ops.predictor_step.reference(*to_double(args), **kwargs)
    with poisoned():
        kernel = ops.predictor_step(*args, **kwargs, impl="triton")
    assert_as_accurate(kernel, plain, truth)


def schedule_of(name):
    import interpreter_grid

    if isinstance(name, int):
        return interpreter_grid.at_random(name)
    return {"in turn": interpreter_grid.in_turn, "first": interpreter_grid.first, "final": interpreter_grid.final}[name]


def among(programs, schedule, args, kwargs, monkeypatch):
    """The kernel run by so many programs at the same time, and how often they took turns."""
    import interpreter_grid

    with monkeypatch.context() as patch, poisoned(), interpreter_grid.together(schedule_of(schedule)) as passed:
        patch.setattr(_triton, "processors", lambda device: programs)
        return ops.predictor_step(*args, **kwargs, impl="triton"), passed


@cpu_only
@pytest.mark.parametrize(("programs", "schedule"), [(3, "in turn"), (3, "first"), (4, "final"), (4, 0), (5, 1)])
def test_programs_that_meet_at_barriers_give_the_bits_of_one(programs, schedule, device, monkeypatch):
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    alone = ops.predictor_step(*args, **kwargs, impl="triton")
    shared, passed = among(programs, schedule, args, kwargs, monkeypatch)
    assert torch.equal(shared, alone)
    layers, steps = args[1].shape[0], args[0].shape[2]
    barriers = 1 + steps * (4 * layers + 2) - 2  # the last step remembers nothing
    assert passed[0] >= 2 * programs * barriers  # everybody arrives, and looks at least once


@cpu_only
@pytest.mark.parametrize("missing", range(11))
def test_every_barrier_is_needed(missing, device, monkeypatch):
    """Where programs only say that they have come and do not wait, somebody reads what is not there yet.

    One barrier of two blocks and two steps at a time is left out, the one that begins the launch and the ten of the first step.
    """
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    args[0], args[3] = args[0][:, :, :2], args[3][:, :2]
    alone = ops.predictor_step(*args, **kwargs, impl="triton")
    whole = kernels._barrier
    programs = 3

    def careless(counter, target, *rest):
        number = int(target.handle.data[0]) // programs - 1
        return whole(counter, target * 0 if number == missing else target, *rest)

    monkeypatch.setattr(kernels, "_barrier", careless)
    wrong = 0
    for schedule in ("first", "final"):
        shared, _ = among(programs, schedule, args, kwargs, monkeypatch)
        wrong += not torch.equal(shared, alone)
    assert wrong


@cpu_only
def test_a_launch_leaves_nothing_behind(device, monkeypatch):
    """Launches one after the other, and one of other shapes between, give the same bits: each has a counter of its own."""
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    other, options = inputs(next(c for c in cases("predictor_step", "tiny") if c.name == "one-step"), torch.float32, device)
    results = [among(3, "in turn", a, k, monkeypatch)[0] for a, k in ((args, kwargs), (other, options), (args, kwargs))]
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("samples", [1, 16, 17, 33, 64])
def test_rows(samples, device):
    """One group of rows, several, and the last one partly filled."""
    args, kwargs = of_samples(samples, device)
    assert_accurate(args, kwargs)


def test_context_and_own_tokens_of_other_clips_are_not_seen(device):
    """Each clip alone gives what it gives beside the other."""
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    both = ops.predictor_step(*args, **kwargs, impl="triton")
    for clip in range(2):
        noise, keys, values, times, *weights = args
        alone = (noise[clip : clip + 1], keys[:, clip : clip + 1], values[:, clip : clip + 1], times[clip : clip + 1])
        torch.testing.assert_close(ops.predictor_step(*alone, *weights, **kwargs, impl="triton"), both[clip : clip + 1])


def test_a_stream_with_a_large_mean(device):
    """The norms' statistics, put together from those of a tile's columns, lose no digits to it."""
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    args[0] = args[0] + 1000
    assert_accurate(args, kwargs)


@pytest.mark.parametrize("tokens", [16, 17, 32])
def test_as_many_context_tokens_as_fit(tokens, device):
    args, kwargs = of_samples(3, device)
    args[1:3] = [torch.randn(2, 1, tokens, 2, 10, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2)]
    assert_accurate(args, kwargs)


def test_times_far_from_zero(device):
    """Times of a clock, in float64; keys are rotated by the caller."""
    case = next(c for c in cases("predictor_step", "tiny") if c.name == "one-step")
    args, kwargs = inputs(case, torch.float32, device)
    args[3] = args[3] + 86_400
    assert_accurate(args, kwargs)


@pytest.mark.parametrize("lay", ["projected", "expanded"])
def test_keys_and_noise_may_be_views(lay, device):
    """Keys as the projection leaves them, (B,T,L,H,d) in memory, and noise that all samples share."""
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    if lay == "projected":
        args[1:3] = [t.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4) for t in args[1:3]]
        assert not args[1].is_contiguous()
    else:
        args[0] = args[0][:, :1].expand(-1, 3, -1, -1)
    dense = [a.contiguous() for a in args]
    viewed = ops.predictor_step(*args, **kwargs, impl="triton")
    assert torch.equal(viewed, ops.predictor_step(*dense, **kwargs, impl="triton"))


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_nothing_to_do(shape, device):
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    clips, samples, steps = shape
    args[0], args[3] = args[0][:clips, :samples, :steps], args[3][:clips, :steps]
    args[1:3] = [t[:, :clips] for t in args[1:3]]
    with _triton.count_launches() as counted:
        assert ops.predictor_step(*args, **kwargs, impl="triton").shape == (*shape, 12)
    assert counted.total() == 0


def test_one_launch_for_all_steps(device):
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    with _triton.count_launches() as counted:
        ops.predictor_step(*args, **kwargs, impl="triton")
    assert counted == {"predictor_step_kernel": 1}


def test_the_launch_is_cooperative(device, monkeypatch):
    """And no larger than the device has processors: programs that wait for one another must all run."""
    started = []
    monkeypatch.setattr(_triton, "launch", lambda kernel, grid, *args, cooperative=False, **constexprs: started.append((grid, cooperative)))
    monkeypatch.setattr(_triton, "processors", lambda device: 7)
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
    ops.predictor_step(*args, **kwargs, impl="triton")
    assert started == [((7,), True)]


def test_refusals_name_the_reason(device):
    args, kwargs = of_samples(65, device)
    with pytest.raises(backend.BackendError, match="at most 64 samples, of all clips together"):
        ops.predictor_step(*args, **kwargs, impl="triton")
    assert not backend.takes_kernel(ops.predictor_step, *args, **kwargs)
    with backend.use_impl("triton"):  # no error either: its caller has another way
        assert not backend.takes_kernel(ops.predictor_step, *args, **kwargs)
        args, kwargs = inputs(TWO_CLIPS, torch.float32, device)
        assert backend.takes_kernel(ops.predictor_step, *args, **kwargs)
        assert backend.takes_kernel(ops.predictor_step, *args[:4])
    noise, keys, values, times, *weights = args
    long = [t.repeat(1, 1, 9, 1, 1) for t in (keys, values)]
    with pytest.raises(backend.BackendError, match="at most 16 context tokens of several clips together"):
        ops.predictor_step(noise, *long, times, *weights, **kwargs, impl="triton")
    with pytest.raises(backend.BackendError, match="at most 32 context tokens of one clip"):
        ops.predictor_step(noise[:1], *(t[:, :1].repeat(1, 1, 2, 1, 1) for t in long), times[:1], *weights, **kwargs, impl="triton")
    with pytest.raises(backend.BackendError, match="keys, values and weights of one dtype"):
        ops.predictor_step(noise, keys, values.bfloat16(), times, *weights, **kwargs, impl="triton")


def test_bad_input(device):
    args, kwargs = inputs(TWO_CLIPS, torch.float32, device)

    def call(place, tensor, **other):
        return ops.predictor_step(*args[:place], tensor, *args[place + 1 :], **{**kwargs, **other})

    with pytest.raises(ValueError, match=r"predictor_step: noise must be \(B,S,h,D\), got a tensor of shape \(3, 3, 20\)"):
        call(0, args[0][0])
    with pytest.raises(ValueError, match=r"times must be \(B,h\) = \(2, 3\), got a tensor of shape \(2, 2\)"):
        call(3, args[3][:, :2])
    with pytest.raises(ValueError, match=r"kv must be \(L,2D,Dm\) = \(2, 40, 12\), got a tensor of shape \(2, 20, 12\)"):
        call(7, args[7][:, :20])
    with pytest.raises(ValueError, match=r"L and T at least 1 and H d = D = 20, got a tensor of shape \(2, 2, 0, 2, 10\)"):
        ops.predictor_step(args[0], args[1][:, :, :0], args[2][:, :, :0], *args[3:], **kwargs)
    with pytest.raises(ValueError, match="rope_size must be even and at most d=10, got 12"):
        call(0, args[0], rope_size=12)
    with pytest.raises(TypeError, match="q must be float32"):
        call(5, args[5].long())
    for impl in ("reference", "triton"):
        with pytest.raises(RuntimeError, match=r"predictor_step has no gradient: call it under torch.no_grad"):
            call(5, args[5].clone().requires_grad_(), impl=impl)
        with torch.no_grad():
            call(5, args[5].clone().requires_grad_(), impl=impl)


# --- in the models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clips", [1, 2])
def test_sampling_takes_one_launch(clips, device):
    """Where Triton is asked for, and on a GPU anyway; the tokens are those of the steps of today's path."""
    model = small.world().eval().to(device)
    z = torch.randn(clips, 3, 64, generator=torch.Generator().manual_seed(0)).to(device)
    times = (torch.arange(6.0) / 7).expand(clips, -1).to(device)
    with backend.use_impl("reference"):
        steps = model.sample(z, times, 3, 5, seed=1)
    with backend.use_impl("triton"), _triton.count_launches() as counted:
        launched = model.sample(z, times, 3, 5, seed=1, cuda_graph=False)
        with torch.no_grad():
            model.predictor.blocks[1].mlp.down_proj.weight.mul_(2)
        changed = model.sample(z, times, 3, 5, seed=1, cuda_graph=False)
    assert counted == {"predictor_step_kernel": 2}
    assert relative_rmse(launched, steps) < 1e-5
    assert not torch.allclose(changed, launched)
    with backend.use_impl("reference"):
        assert relative_rmse(changed, model.sample(z, times, 3, 5, seed=1)) < 1e-5


@cpu_only
def test_sampling_on_a_cpu_stays_as_it_is():
    model = small.world().eval()
    with _triton.count_launches() as counted:
        model.sample(torch.zeros(1, 2, 64), torch.arange(3.0)[None], 1, 3, seed=1)
    assert not counted
    assert "q" not in model.predictor._packed, "weights were stacked for nothing"


def test_many_samples_take_the_other_path(device):
    model = small.world().eval().to(device)
    z, times = torch.zeros(1, 2, 64, device=device), torch.arange(3.0, device=device)[None]
    with backend.use_impl("triton"), _triton.count_launches() as counted:
        model.sample(z, times, 1, 65, seed=1, cuda_graph=False)
    assert "predictor_step_kernel" not in counted
    assert counted["context_attention_forward_kernel"] == 2


def test_autocast(device):
    model = small.world().eval().to(device)
    z, times = torch.randn(1, 2, 64, device=device), torch.arange(4.0, device=device)[None] / 9
    plain = model.sample(z, times, 2, 3, seed=1, cuda_graph=False)
    with torch.autocast(device.type, torch.bfloat16), backend.use_impl("triton"), _triton.count_launches() as counted:
        half = model.sample(z, times, 2, 3, seed=1, cuda_graph=False)
    assert counted == {"predictor_step_kernel": 1}
    assert half.dtype == torch.float32
    assert 0 < relative_rmse(half, plain) < 0.05


@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_golden_rollouts(variant, device):
    """The released code's features, from tokens that one launch made."""
    tensors, known = golden.load("deltaworld", variant), golden.meta("deltaworld_rollout")
    context, horizon = known["ctx_len"], known["horizon"]
    queries = torch.cat([tensors[f"rollout.query{t}"] for t in range(horizon)], 2).to(device)
    frames, times, truth = (tensors[k].to(device) for k in ("frames", "timestamps", "rollout.preds"))
    world = make_world(variant, Savings()).to(device)
    done = world.rollout(frames[:, :context], times, horizon, truth.shape[1], "none", queries=queries)
    with backend.use_impl("triton"), _triton.count_launches() as counted:
        tokens = world.sample(done.context, times, horizon, truth.shape[1], queries=queries, cuda_graph=False)
    assert counted == {"predictor_step_kernel": 1}
    features = world.decode(tokens, done.last, size=done.size)
    assert relative_rmse(features, truth) < 1e-5
    assert (features - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.gpu
def test_a_captured_launch_computes_what_the_launch_does(device):
    model = small.world().eval().to(device)
    z, times = torch.randn(1, 3, 64, device=device), torch.arange(6.0, device=device)[None] / 7
    plain = model.sample(z, times, 3, 20, seed=1, cuda_graph=False)
    for _ in range(3):
        assert torch.equal(model.sample(z, times, 3, 20, seed=1), plain)

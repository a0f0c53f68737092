"""Every tensor that the released code computed is computed here again, in float32, within 1e-5 relative.

Relative is the largest error over the root mean square of the golden tensor, which is stricter than both the largest error over
the largest value and RMS over RMS. Gradients are sums of cancelling terms, and the golden ones themselves differ from float64 by
up to 1.5e-5 of their RMS: for them it is the largest error over the largest value.

Everything runs with the exact savings and with each of them switched off, with gradients (every step separate) and, where the
golden files hold no gradient, without (weights packed, LayerScale folded).
"""

from __future__ import annotations

import golden
import pytest
import torch
from compare import assert_as_accurate, relative_rmse
from torch import nn

from deltakern import DeltaTok, DeltaWorld, DINOv3, DINOWorld, ops
from deltakern.models import DINOv3Config, Savings, checkpoint

LIMIT = 1e-5
TOKENIZERS = [
    ("deltatok_default", "post_rope"),
    ("deltatok_default", "pre_rope"),
    ("deltatok_nodelta", "post_rope"),
    ("deltatok_nodelta", "pre_rope"),
    ("deltatok_plain", "post_rope"),
]

# Without use_delta the decoder's patches are all alike, so its first block's attention gradients all but cancel. PyTorch's flash
# attention leaves errors of 0.4e-5 to 4.6e-5 of their largest value in them, seen over ten inputs; its plain attention 0.7e-5.
CANCELLING = {
    f"decoder_blocks.0.attention.{name}" for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight")
}


def switching(*names: str):
    """Runs a test with all savings, with none, and without each of those named."""
    cases = {"all savings": Savings(), "no savings": Savings.none(), **{f"without {n}": Savings(**{n: False}) for n in names}}
    return pytest.mark.parametrize("savings", list(cases.values()), ids=list(cases))


@pytest.fixture(params=[True, False], ids=["with gradients", "without gradients"])
def gradients(request):
    with torch.set_grad_enabled(request.param):
        yield request.param


def assert_reproduced(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], error=None) -> None:
    """Every tensor of ``ours`` has the shape and, within LIMIT, the values of the same name in ``theirs``. Lists all that do not."""
    wrong = []
    for name, value in ours.items():
        value, truth = value.detach(), theirs[name]
        assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, golden {tuple(truth.shape)}"
        assert value.dtype == truth.dtype, f"{name}: {value.dtype}, golden {truth.dtype}"
        found = (error or over_rms)(value.double(), truth.double())
        if not found <= LIMIT:
            wrong.append(f"{name}: {found:.2e}")
    assert not wrong, f"over {LIMIT}: {', '.join(wrong)}"


def over_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).abs().max() / truth.square().mean().sqrt()).item()


def over_largest(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).abs().max() / truth.abs().max()).item()


def make_backbone() -> DINOv3:
    known = golden.meta("dinov3_backbone")
    config = DINOv3Config(
        hidden_size=known["hidden_size"],
        num_hidden_layers=known["num_hidden_layers"],
        num_attention_heads=known["num_heads"],
        intermediate_size=known["intermediate_size"],
        patch_size=known["patch_size"],
        num_register_tokens=known["num_register_tokens"],
    )
    backbone = DINOv3(config=config)
    checkpoint.load_into(backbone, {k: v for k, v in golden.load("dinov3_backbone").items() if k.startswith("backbone.")})
    return backbone


def make_tokenizer(name: str, variant: str, savings: Savings, **arguments) -> DeltaTok:
    config = golden.meta(name)["config"]
    switches = {k: v for k, v in config.items() if k not in ("hidden_size", "num_heads")}
    tokenizer = DeltaTok(
        make_backbone(), qk_norm_order=variant, intermediate_size=4 * config["hidden_size"], savings=savings, **switches, **arguments
    )
    checkpoint.load_into(tokenizer, golden.under(golden.load(name, variant), "param."))
    return tokenizer.eval()


def make_world(variant: str, savings: Savings, **arguments) -> DeltaWorld:
    config, rollout = golden.meta("deltaworld_train"), golden.meta("deltaworld_rollout")
    config = config["config"]
    width = config["hidden_size"]
    tokenizer = DeltaTok(make_backbone(), config["tokenizer_layers"], qk_norm_order=variant, intermediate_size=4 * width, savings=savings)
    world = DeltaWorld(
        tokenizer,
        predictor_hidden_size=width,
        predictor_num_hidden_layers=config["predictor_layers"],
        predictor_num_heads=config["num_heads"],
        num_samples_train=config["num_samples_train"],
        num_samples_eval=rollout["num_samples_eval"],
        savings=savings,
        **arguments,
    )
    weights = {k: v for k, v in golden.load("deltaworld", variant).items() if k.startswith(("tokenizer.", "predictor."))}
    checkpoint.load_into(world, weights)
    return world.eval()


def test_backbone():
    tensors = golden.load("dinov3_backbone")
    backbone = make_backbone()
    assert_reproduced({"features": backbone(tensors["frames"])}, tensors)
    assert sorted(backbone.state_dict()) == sorted(k for k in tensors if k.startswith("backbone."))


@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_names_and_shapes_are_the_released_ones_in_the_released_order(variant):
    backbone = make_backbone()
    tokenizer = DeltaTok(backbone, 1, intermediate_size=512, qk_norm_order=variant)
    ours = [(k, tuple(v.shape)) for k, v in tokenizer.state_dict().items() if not k.startswith("backbone.")]
    assert ours == golden.state_dict_keys("deltatok", variant)
    world = DeltaWorld(tokenizer, predictor_hidden_size=128, predictor_num_hidden_layers=2, predictor_num_heads=2)
    assert [(k, tuple(v.shape)) for k, v in world.predictor.state_dict().items()] == golden.state_dict_keys("predictor", variant)
    assert sorted({k.partition(".")[0] for k in world.state_dict()}) == golden.meta("state_dict_keys")["deltaworld_top"]


@switching("last_row", "fold_value", "drop_row")
@pytest.mark.parametrize(("name", "variant"), [t for t in TOKENIZERS if t != ("deltatok_nodelta", "pre_rope")])
def test_tokenizer(name, variant, savings, gradients):
    tensors = golden.load(name, variant)
    tokenizer = make_tokenizer(name, variant, savings)
    rows, columns = golden.meta(name)["patch_grid"]
    rope = tokenizer._rope(torch.zeros(1, 1, 3, 16 * rows, 16 * columns))
    z = tokenizer.encode(tensors["x"], tensors["y"], rope)
    y_hat = tokenizer.decode(z, tensors["x"], rope)
    ours = {
        "rope_cos": rope[0],
        "rope_sin": rope[1],
        "z": z,
        "y_hat": y_hat,
        "loss": ops.recon_loss(y_hat, tensors["y"], kind="log_cosh"),
        "seq.z": tokenizer.tokenize_offline(tensors["seq.first"], tensors["seq.y"], rope),
    }
    assert_reproduced(ours, tensors)
    covered = {*ours, "x", "y", "seq.first", "seq.y"}  # those that are given
    assert {k for k in tensors if not k.startswith(("param.", "grad."))} == covered


def gradients_of(tokenizer: DeltaTok, tensors: dict[str, torch.Tensor], grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Gradients of the training loss by parameter, and of the inputs "x" and "y"."""
    dtype = tokenizer.norm.weight.dtype
    rope = tuple(t.to(dtype) for t in tokenizer.eval()._rope(torch.zeros(1, 1, 3, 16 * grid[0], 16 * grid[1])))
    tokenizer.train()
    inputs = {k: tensors[k].clone().to(dtype).requires_grad_() for k in ("x", "y")}
    y_hat = tokenizer.decode(tokenizer.encode(**inputs, rope=rope), inputs["x"], rope)
    ops.recon_loss(y_hat, inputs["y"].detach(), kind="log_cosh").backward()
    return {k: p.grad for k, p in {**dict(tokenizer.named_parameters()), **inputs}.items() if p.grad is not None}


@switching("last_row", "fold_value", "drop_row")
@pytest.mark.parametrize(("name", "variant"), TOKENIZERS)
def test_gradients_of_the_tokenizer(name, variant, savings):
    tensors, known = golden.load(name, variant), golden.meta(name, variant)
    ours = gradients_of(make_tokenizer(name, variant, savings), tensors, known["patch_grid"])
    theirs = golden.under(tensors, "grad.")
    norms = {k: torch.tensor(v) for k, v in known["grad_norms"].items()}
    assert ours.keys() == norms.keys() | ({"y"} if name == "deltatok_nodelta" else {"x", "y"})
    leave = {golden.named(k, variant) for k in CANCELLING} if name == "deltatok_nodelta" else set()
    assert_reproduced({k: ours[k] for k in theirs if k not in leave}, theirs, over_largest)
    assert_reproduced({k: ours[k].norm() for k in norms if k not in leave}, norms)


@switching("last_row", "fold_value", "drop_row")
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_gradients_that_cancel(variant, savings):
    """The golden ones and ours, by plain attention, are both what float64 says, RMS over RMS."""
    tensors, known = golden.load("deltatok_nodelta", variant), golden.meta("deltatok_nodelta", variant)
    ours, exact = (
        gradients_of(make_tokenizer("deltatok_nodelta", variant, savings, attention="sdpa-math").to(dtype), tensors, known["patch_grid"])
        for dtype in (torch.float32, torch.float64)
    )
    for name in sorted(golden.named(k, variant) for k in CANCELLING):
        assert relative_rmse(ours[name], exact[name]) <= LIMIT, name
        assert abs(known["grad_norms"][name] / exact[name].norm().item() - 1) <= LIMIT, name
        if f"grad.{name}" in tensors:
            assert relative_rmse(tensors[f"grad.{name}"], exact[name]) <= 2 * LIMIT, name


@switching("last_row", "fold_value", "black_frame")
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_world_best_of_many(variant, savings):
    tensors, known = golden.load("deltaworld", variant), golden.meta("deltaworld_train", variant)
    world = make_world(variant, savings).train()
    criterion = nn.SmoothL1Loss(reduction="none", beta=0.1)
    z = world.tokenizer.tokenize(tensors["frames"])
    with torch.no_grad():
        candidates = world.predict(z[:, :-1], tensors["timestamps"], tensors["queries"])
    best, least = ops.best_of_n(candidates, z[:, 1:], loss="smooth_l1", beta=0.1)
    z_hat, z_tgt = world(tensors["frames"], tensors["timestamps"], criterion, queries=tensors["queries"])
    loss = criterion(z_hat, z_tgt.detach()).mean()
    ours = {
        "z": z,
        "candidates": candidates,
        "candidate_losses": criterion(candidates, z[:, 1:, None].expand_as(candidates)).mean(-1),
        "z_hat": z_hat,
        "z_tgt": z_tgt,
        "loss": loss,
    }
    assert_reproduced(ours, tensors)
    assert torch.equal(best, tensors["best"])
    assert_reproduced({"least": least}, {"least": tensors["candidate_losses"].amin(-1)})

    loss.backward()
    assert all(p.grad is None for p in world.tokenizer.parameters())
    ours = {k: p.grad for k, p in world.predictor.named_parameters()}
    norms = {k: torch.tensor(v) for k, v in known["grad_norms"].items()}
    assert ours.keys() == norms.keys()
    assert_reproduced({k: g.norm() for k, g in ours.items()}, norms)
    theirs = golden.under(tensors, "grad.")
    # The release's own float32 gradients err by up to 1.1e-5 of their largest value, so both are held to float64's.
    exact_world, exact_criterion = make_world(variant, savings).double().train(), nn.SmoothL1Loss(reduction="none", beta=0.1)
    times, queries = tensors["timestamps"].double(), tensors["queries"].double()
    prediction, target = exact_world(tensors["frames"], times, exact_criterion, queries=queries)
    exact_criterion(prediction, target.detach()).mean().backward()
    exact = {k: p.grad for k, p in exact_world.predictor.named_parameters()}
    for name, golden_gradient in theirs.items():
        assert over_largest(golden_gradient.double(), exact[name]) <= 2 * LIMIT, name
        assert_as_accurate(ours[name], golden_gradient, exact[name], name=name)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_world_picks_the_same_noise_however_many_candidates_it_holds_at_once(chunk):
    tensors = golden.load("deltaworld", "pre_rope")
    world = make_world("pre_rope", Savings(), candidate_chunk=chunk).train()
    criterion = nn.SmoothL1Loss(reduction="none", beta=0.1)
    z_hat, z_tgt = world.train_on_tokens(tensors["z"], tensors["timestamps"], criterion, queries=tensors["queries"])
    assert_reproduced({"z_hat": z_hat, "z_tgt": z_tgt}, tensors)


@switching("last_row", "fold_value", "drop_row", "black_frame", "context_cache")
@pytest.mark.parametrize("variant", golden.VARIANTS)
def test_world_rollout(variant, savings, gradients):
    tensors, known = golden.load("deltaworld", variant), golden.meta("deltaworld_rollout")
    world = make_world(variant, savings)
    total = known["ctx_len"] + known["horizon"]
    queries = torch.cat([tensors[f"rollout.query{t}"] for t in range(known["horizon"])], 2)
    preds, targets, context = world(
        tensors["frames"][:, :total], tensors["timestamps"][:, :total], ctx_len=known["ctx_len"], queries=queries
    )
    assert_reproduced({"rollout.preds": preds, "rollout.targets": targets}, tensors)
    assert_reproduced({"context": context}, {"context": world.backbone(tensors["frames"][:, : known["ctx_len"]])})


@switching()
@pytest.mark.parametrize("kind", ["plain", "bom"])
def test_dinoworld(kind, savings, gradients):
    everything = golden.load("dinoworld")
    tensors = golden.under(everything, f"{kind}.")
    frames, timestamps = everything["frames"], everything["timestamps"]
    preds = tensors["rollout.preds"]
    best_of_many = {"use_bom": True, "num_samples_train": tensors["queries"].shape[2]} if kind == "bom" else {}
    world = DINOWorld(
        make_backbone(),
        predictor_hidden_size=128,
        predictor_num_hidden_layers=1,
        predictor_num_heads=2,
        num_samples_eval=preds.shape[1],
        savings=savings,
        **best_of_many,
    )
    checkpoint.load_into(world, golden.under(tensors, "param."))

    world.train()
    criterion = nn.SmoothL1Loss(reduction="none", beta=0.1)
    y_hat, target = world(frames, timestamps, criterion, queries=tensors.get("queries"))
    assert_reproduced({"y_hat": y_hat, "loss": criterion(y_hat, target).mean()}, tensors)

    world.eval()
    horizon = preds.shape[2]
    queries = torch.cat([tensors[f"rollout.query{t}"] for t in range(horizon)], 2) if kind == "bom" else None
    ours, _, _ = world(frames, timestamps, ctx_len=frames.shape[1] - horizon, queries=queries)
    assert_reproduced({"rollout.preds": ours}, tensors)
    given = {k for k in tensors if k.startswith(("param.", "queries", "rollout.query"))}
    assert tensors.keys() - given == {"y_hat", "loss", "rollout.preds"}

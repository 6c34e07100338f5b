"""Any torch module with adapters to ONNX: values, nodes, names, and the model left as it was."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import fourierft_export as ff
from fourierft_export.adapt.active import activate
from fourierft_export.errors import BadInputError, UsageError

MODES = ("merged", "unmerged")

Run = Callable[[Path, dict[str, Any]], dict[str, np.ndarray]]


class Plain(nn.Module):
    """Linear layers of every kind: 2-D and 3-D inputs, with and without bias, one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.square = nn.Linear(8, 8, bias=False)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 5, bias=False), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.first(x))
        x = self.twice(torch.relu(self.twice(self.square(x))))
        return x, self.head(x.mean(dim=1))


def adapted(model: nn.Module, seed: int = 3, name: str = "default", **fields: Any) -> nn.Module:
    """`model` with random-normal spectra, as PEFT starts them, that clearly change the output."""
    torch.manual_seed(seed)
    options = {"n_frequency": 12, "scaling": 6.0, "target_modules": "all-linear"} | fields
    return ff.inject(model, ff.FourierFTConfig(random_loc_seed=seed, **options), name).eval()


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


def batch_input(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 7, 6, generator=torch.Generator().manual_seed(rows))


def close(got: np.ndarray, expected: torch.Tensor) -> None:
    want = expected.detach().float().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.fixture(scope="module")
def base_export(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """torch's own export of the bare model."""
    path = tmp_path_factory.mktemp("base") / "base.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain(),
            (batch_input(),),
            path,
            dynamo=True,
            verbose=False,
            external_data=False,
            output_names=["states", "logits"],
            dynamic_shapes={"x": {0: "batch"}},
        )
    return onnx.load(path)


@pytest.fixture(scope="module", params=MODES)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, nn.Module, Any]:
    model = adapted(plain())
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    report = ff.export_onnx(
        model,
        batch_input(),
        path,
        mode=request.param,
        output_names=["states", "logits"],
        dynamic_shapes={"x": {0: "batch"}},
    )
    return request.param, path, model, report


def test_outputs_are_those_of_pytorch_at_another_batch_size(
    exported: tuple[str, Path, nn.Module, Any], run: Run
) -> None:
    """In ONNX Runtime and in onnx's reference evaluator."""
    _, path, model, _ = exported
    x = batch_input(9)
    got = run(path, {"x": x})
    for name, expected in zip(("states", "logits"), model(x), strict=True):
        close(got[name], expected)
    base = plain()(x)[1].detach().numpy()
    assert np.abs(got["logits"] - base).max() > 0.1 * np.abs(base).max()
    by_reference = ReferenceEvaluator(str(path)).run(None, {"x": x.numpy()})
    for found, expected in zip(by_reference, model(x), strict=True):
        close(found, expected)


def test_merged_nodes_are_those_of_the_plain_export(
    base_export: onnx.ModelProto, tmp_path: Path, node_list: Any
) -> None:
    path = tmp_path / "model.onnx"
    ff.export_onnx(
        adapted(plain()),
        batch_input(),
        path,
        output_names=["states", "logits"],
        dynamic_shapes={"x": {0: "batch"}},
    )
    made = onnx.load(path)
    assert node_list(made) == node_list(base_export)
    assert [n.input for n in made.graph.node] == [n.input for n in base_export.graph.node]
    assert not made.functions


def test_unmerged_folds_to_the_nodes_of_merged(tmp_path: Path, folded: Any, node_list: Any) -> None:
    lists, weights = [], []
    for mode in MODES:
        path = tmp_path / f"{mode}.onnx"
        ff.export_onnx(adapted(plain()), batch_input(), path, mode=mode)
        model = folded(path)
        assert not model.functions
        # ONNX Runtime numbers the nodes that it makes itself.
        lists.append([kind for _, kind, *_ in node_list(model)])
        found = [numpy_helper.to_array(t) for t in model.graph.initializer]
        weights.append([w for w in found if w.ndim == 2])
    assert lists[0] == lists[1]
    assert len(weights[0]) == len(weights[1]) == 5
    for merged in weights[0]:
        error = min(np.abs(merged - w).max() for w in weights[1] if w.shape == merged.shape)
        assert error <= 2e-6 * np.abs(merged).max()


def test_metadata_tells_where_everything_is(exported: tuple[str, Path, nn.Module, Any]) -> None:
    mode, path, model, report = exported
    proto = onnx.load(path)
    stored = {p.key: p.value for p in proto.metadata_props}
    content = json.loads(stored["fourierft_export"])
    bundle = ff.capture(model)
    adapter = content["adapters"]["default"]
    assert (content["mode"], content["version"]) == (mode, ff.__version__)
    assert (adapter["seed"], adapter["scaling"]) == (3, 6.0)
    assert adapter["bundle_sha256"] == bundle.sha256
    assert [one["name"] for one in adapter["layers"]] == [one.name for one in bundle.layers]
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    state = plain().state_dict()
    for layer in adapter["layers"]:
        (weight,) = content["weights"][layer["name"]]
        found = tensors[weight["initializer"]]
        upright = found.T if weight["transposed"] else found
        base = state[f"{layer['name']}.weight"].numpy()
        assert np.array_equal(upright, base) == (mode == "unmerged")
        if mode == "unmerged":
            np.testing.assert_array_equal(tensors[layer["entries"]], bundle.entries(layer["name"]))
            assert layer["spectrum"] == f"{layer['name']}.spectrum"
            spectrum, scaling = (tensors[layer[kind]] for kind in ("spectrum", "scaling"))
            np.testing.assert_array_equal(spectrum, bundle.spectra[layer["name"]])
            assert scaling == 6.0
    # `square` and `twice` have one shape and one seed: their entries are there once.
    shared = {"first.entries", "head.0.entries", "head.2.entries", "square.entries"}
    assert {name for name in tensors if name.endswith(".entries")} == (
        shared if mode == "unmerged" else set()
    )
    assert set(report.layers) == set(content["weights"])


@pytest.mark.parametrize("mode", MODES)
def test_two_active_adapters_add_up(mode: str, tmp_path: Path, run: Run) -> None:
    model = adapted(adapted(plain()), seed=8, name="second", target_modules=["square", "head.2"])
    activate(model, ["default", "second"])
    path = tmp_path / "model.onnx"
    report = ff.export_onnx(model, batch_input(), path, mode=mode)
    assert report.adapters == ("default", "second")
    x = batch_input()
    got = run(path, {"x": x})
    close(got["output_1"], model(x)[1])
    activate(model, "default")
    alone = model(x)[1].detach().numpy()
    assert np.abs(got["output_1"] - alone).max() > 1e-2 * np.abs(alone).max()
    names = {t.name for t in onnx.load(path).graph.initializer}
    both = {"square.default.spectrum", "square.second.spectrum"}
    assert names & both == (both if mode == "unmerged" else set())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8, bias=False))
    model = adapted(model.to(dtype), target_modules=["0", "1"])
    path = tmp_path / "model.onnx"
    ff.export_onnx(model, torch.randn(5, 8).to(dtype), path, mode=mode)
    x = torch.eye(8).to(dtype)
    (got,) = ReferenceEvaluator(str(path)).run(
        None, {onnx.load(path).graph.input[0].name: ff_array(x)}
    )
    want = model(x).detach().float().numpy()
    unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    np.testing.assert_allclose(
        got.astype(np.float32), want, rtol=0, atol=2 * unit * abs(want).max()
    )
    if mode == "merged":
        weights = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
        for layer in model:
            exact = ff_array(layer.effective_weight())
            assert any(
                np.array_equal(w, e) for w in weights for e in (exact, exact.T) if w.ndim == 2
            )


def ff_array(tensor: torch.Tensor) -> np.ndarray:
    from fourierft_export.adapt.base_linear import to_array

    return to_array(tensor)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_spectra_are_stored_exactly(mode: str, tmp_path: Path) -> None:
    model = adapted(plain())
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.shape[0] == 12:
            parameter.data = parameter.data.to(torch.bfloat16)
    path = tmp_path / "model.onnx"
    report = ff.export_onnx(model, batch_input(), path, mode=mode)
    if mode == "merged":
        assert report.notes == ()
        return
    assert any("bfloat16" in note for note in report.notes)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    spectrum = ff.capture(model).spectra["first"]
    assert spectrum.dtype.name == "bfloat16"
    np.testing.assert_array_equal(tensors["first.spectrum"], spectrum.astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
def test_attention_that_reads_its_projection(mode: str, tmp_path: Path, run: Run) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mixed: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
            return mixed

    torch.manual_seed(0)
    model = adapted(Attention().eval(), target_modules=["out_proj"])
    path = tmp_path / "model.onnx"
    x = torch.randn(2, 5, 8)
    ff.export_onnx(model, x, path, mode=mode)
    close(run(path, {"x": x})["output"], model(x))


@pytest.mark.parametrize("mode", MODES)
def test_layers_with_equal_base_weights_get_their_own(mode: str, tmp_path: Path, run: Run) -> None:
    """The exporter gives equal constants one initializer; the adapters differ."""

    class Equal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
            for layer in (self.b, self.c):
                layer.load_state_dict(self.a.state_dict())

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.a(x), self.b(x), self.c(x)

    torch.manual_seed(0)
    model = adapted(Equal().eval(), target_modules=["a", "b"])
    path = tmp_path / "model.onnx"
    x = torch.randn(2, 5, 6)
    ff.export_onnx(model, x, path, mode=mode)
    got = run(path, {"x": x})
    for i, expected in enumerate(model(x)):
        close(got[f"output_{i}"], expected)
    assert np.abs(got["output_0"] - got["output_1"]).max() > 0.1


def test_the_model_is_as_it_was_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = adapted(plain()).train()
    model.head.eval()
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    level = logging.getLogger("torch.onnx").level
    steps: list[tuple[str, int, int]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ff.export_onnx(
            model,
            batch_input(),
            tmp_path / "model.onnx",
            mode="unmerged",
            progress=lambda *step: steps.append(step),
        )
    assert capfd.readouterr() == ("", "")
    assert [str(w.message) for w in caught if "torch" in str(w.filename)] == []
    assert logging.getLogger("torch.onnx").level == level
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in modules.items())
    assert len(after) == len(modules)
    assert {name: module.training for name, module in after.items()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert steps[0][1] == 0
    assert steps[-1][1] == steps[-1][2]


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="merged or unmerged"):
        ff.export_onnx(adapted(plain()), batch_input(), out, mode="swapped")
    with pytest.raises(UsageError, match="18 to 25"):
        ff.export_onnx(adapted(plain()), batch_input(), out, opset=17)
    with pytest.raises(UsageError, match="active adapter"):
        ff.export_onnx(plain(), batch_input(), out)
    idle = adapted(plain())
    activate(idle, [])
    with pytest.raises(UsageError, match="active adapter"):
        ff.export_onnx(idle, batch_input(), out)
    with pytest.raises(UsageError, match="5 of another") as caught:
        ff.export_onnx(adapted(plain().double()), batch_input().double(), out)
    assert caught.value.offenders[0] == "first: torch.float64"
    with pytest.raises(UsageError, match="found 2: logits"):
        ff.export_onnx(adapted(plain()), batch_input(), out, output_names=["logits"])
    assert list(tmp_path.iterdir()) == []
    out.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        ff.export_onnx(adapted(plain()), batch_input(), out)
    assert out.read_text() == "mine"


def test_outputs_within_outputs(tmp_path: Path, run: Run) -> None:
    """Each has a name of its own; names given choose, whatever their order."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            y = self.layer(x)
            return {"a": {"y": y, "pair": (y + 1, y + 2)}, "b": y + 3}

    model, x, path = adapted(Nested().eval()), torch.randn(2, 4), tmp_path / "model.onnx"
    with torch.no_grad():
        y = model(x)["a"]["y"].numpy()
    added = {"a.y": 0, "a.pair.0": 1, "a.pair.1": 2, "b": 3}
    chosen: list[tuple[list[str] | None, list[str]]] = [
        (None, [*added]),
        (["b", "a.y"], ["b", "a.y"]),
        (["b", "a"], ["b", "a.y", "a.pair.0", "a.pair.1"]),
    ]
    for names, want in chosen:
        ff.export_onnx(model, x, path, output_names=names, force=True)
        found = run(path, {"x": x})
        assert [*found] == want
        for name, value in found.items():
            np.testing.assert_allclose(value, y + added[name], rtol=0, atol=1e-5)


def test_a_layer_that_is_never_called_is_named(tmp_path: Path) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            used: torch.Tensor = self.used(x)
            return used

    with pytest.raises(BadInputError) as caught:
        ff.export_onnx(adapted(Unused().eval()), torch.randn(2, 4), tmp_path / "model.onnx")
    assert caught.value.offenders == ("idle",)
    assert list(tmp_path.iterdir()) == []


def test_what_torch_cannot_follow_is_a_usage_error(tmp_path: Path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(UsageError, match=r"torch\.onnx"):
        ff.export_onnx(adapted(Branches().eval()), torch.randn(2, 4), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mode", "opset"), [("merged", 18), ("unmerged", 18), ("unmerged", 23)])
def test_external_data_and_opset_on_request(
    mode: str, opset: int, tmp_path: Path, run: Run
) -> None:
    """The functions of mode unmerged are of the model's opset."""
    model, path, x = adapted(plain()), tmp_path / "model.onnx", batch_input()
    report = ff.export_onnx(model, x, path, mode=mode, opset=opset, external_data=True)
    assert report.data == f"{path}.data"
    assert report.bytes == path.stat().st_size + Path(report.data).stat().st_size
    assert report.opset == opset
    functions = onnx.load(path).functions
    assert {o.version for f in functions for o in f.opset_import if not o.domain} == (
        {opset} if mode == "unmerged" else set()
    )
    close(run(path, {"x": x})["output_1"], model(x)[1])


@pytest.mark.parametrize("mode", MODES)
def test_saved_heads_and_biases_are_the_adapters_own(mode: str, tmp_path: Path, run: Run) -> None:
    model = adapted(
        plain(), target_modules=["first", "twice"], bias="fourier_only", modules_to_save=["head"]
    )
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    saved = ff.capture(model).saved
    assert {"first.bias", "twice.bias", "head.0.weight", "head.2.bias"} <= set(saved)
    path = tmp_path / "model.onnx"
    ff.export_onnx(model, batch_input(), path, mode=mode)
    x = batch_input()
    got = run(path, {"x": x})
    for i, expected in enumerate(model(x)):
        close(got[f"output_{i}"], expected)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    np.testing.assert_array_equal(tensors["first.bias"], saved["first.bias"])
    np.testing.assert_array_equal(tensors["head.2.bias"], saved["head.2.bias"])


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.norm.running_mean = torch.randn(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.again(self.layer(x), x, self.layer.weight)

    def again(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Einsum(OneLayer):
    def again(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y + torch.einsum("bi,oi->bo", x, weight)


class OneRow(OneLayer):
    def again(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y + weight[1]


class Norm(OneLayer):
    def again(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y / weight.norm()


class Fused(OneLayer):
    """The exporter would join the layer with the norm."""

    def again(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.norm(y)


class BothWays(OneLayer):
    def again(self, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y + x @ weight


@pytest.mark.parametrize("kind", [Einsum, OneRow, Norm, Fused, BothWays])
def test_whatever_is_computed_from_a_weight_is_computed_from_the_adapted_one(
    kind: type[OneLayer], tmp_path: Path
) -> None:
    model, x = adapted(kind(), scaling=20.0, target_modules=["layer"]), torch.randn(3, 6)
    want = model(x).detach().numpy()
    bundle = ff.capture(model)
    for mode in (*MODES, "paired", "swappable"):
        path = tmp_path / f"{mode}.onnx"
        if mode == "swappable" and kind not in (Fused, Einsum):
            with pytest.raises(UsageError, match="layers that are a MatMul or Gemm"):
                ff.export_onnx(model, (x,), path, mode=mode)
            continue
        ff.export_onnx(model, (x,), path, mode=mode)
        session = ff.AdapterSession(path)
        adapter = None
        if mode in ("paired", "swappable"):
            session.load(adapter := "a", bundle)
        found = session.run({"x": x.numpy()}, adapter=adapter)["output"]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_bank_of_heads_with_equal_base_tensors_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6)).eval()
    adapted(model, target_modules=["0", "2"], modules_to_save=["1", "3"])
    with torch.no_grad():
        for path in ("1", "3"):
            model.get_submodule(path).version("default").module.weight.mul_(2.0)
    x = torch.randn(4, 6)
    dynamic = {"input": {0: "batch"}}
    path = tmp_path / "bank.onnx"
    ff.export_onnx(model, (x,), path, mode="bank", dynamic_shapes=dynamic)
    session = ff.AdapterSession(path)
    session.load("a", ff.capture(model))
    (found,) = session.run({"input": x.numpy()}, adapter=["a"] * 4).values()
    np.testing.assert_allclose(found, model(x).detach().numpy(), atol=1e-4)

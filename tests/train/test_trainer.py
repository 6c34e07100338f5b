"""Adapters in transformers' own Trainer: the same losses as PEFT's, checkpoints of kilobytes."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import fourierft_export as ff
from fourierft_export.adapt.modules import fourier_layers
from fourierft_export.errors import BaseMismatchError, UsageError

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
CONFIG = ff.FourierFTConfig(
    n_frequency=20, scaling=40.0, task_type="SEQ_CLS", target_modules=["query", "value"]
)
BUNDLE = "adapter.fourierft.safetensors"


def bert(seed: int = 0, **fields: Any) -> Any:
    torch.manual_seed(seed)
    fields |= {"vocab_size": 60, "max_position_embeddings": 32, "num_labels": 3}
    config = tf.BertConfig(**SHAPE, **fields)
    return tf.BertForSequenceClassification(config)


def injected(config: ff.FourierFTConfig = CONFIG, seed: int = 0, name: str = "default") -> Any:
    model = bert(seed)
    torch.manual_seed(5)
    return ff.inject(model, config, name)


def rows() -> list[dict[str, Tensor]]:
    """Sentences of eight tokens; the label is a function of the second one."""
    ids = torch.randint(1, 60, (48, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row[1] % 3} for row in ids]


class StopAt(tf.TrainerCallback):  # type: ignore[misc]
    """Ends a run as a kill after a checkpoint would, without changing its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def trainer(
    model: Any,
    folder: Path,
    *callbacks: Any,
    bundles: ff.BundleCallback | None = None,
    optimizers: tuple[Any, Any] = (None, None),
    data: Any = None,
    steps: int = 8,
    **settings: Any,
) -> Any:
    defaults = {"learning_rate": 2e-2, "save_steps": 4, "per_device_train_batch_size": 8}
    args = tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **(defaults | settings),
    )
    data = data or rows()
    return tf.Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data[:16],
        callbacks=[bundles or ff.BundleCallback(), *callbacks],
        optimizers=optimizers,
    )


def losses(run: Any) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.stack([r["input_ids"] for r in rows()])).logits
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An uninterrupted run of eight steps, with a checkpoint after four."""
    run = trainer(injected(), tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def test_losses_and_spectra_are_those_of_peft_in_the_trainer(tmp_path: Path) -> None:
    from peft import FourierFTConfig, get_peft_model

    config = FourierFTConfig(
        n_frequency=20, scaling=40.0, task_type="SEQ_CLS", target_modules=["query", "value"]
    )
    base = bert()
    torch.manual_seed(5)
    theirs = get_peft_model(base, config)
    runs = []
    for model, folder in ((theirs, "peft"), (injected(), "ours")):
        run = trainer(model, tmp_path / folder, steps=20, save_strategy="no", num_train_epochs=4)
        if model is theirs:
            run.remove_callback(ff.BundleCallback)
        run.train()
        runs.append(run)
    expected, found = (np.array(losses(run)) for run in runs)
    assert len(expected) == 20
    assert expected[:4].mean() > 1.01 * expected[-4:].mean(), "the curve must fall"
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    bundle = ff.capture(runs[1].model)
    for name, tensor in theirs.named_parameters():
        if "fourierft_spectrum" in name:
            layer = name.removeprefix("base_model.model.").split(".fourierft_spectrum")[0]
            np.testing.assert_allclose(bundle.spectra[layer], tensor.detach(), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_holds_the_adapter_and_not_the_base(whole: Any) -> None:
    folder = Path(whole.args.output_dir) / "checkpoint-8"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    learning = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in whole.model.parameters())
    assert everything > 50 * learning
    assert {BUNDLE, "model.safetensors", "optimizer.pt", "trainer_state.json"} <= sizes.keys()
    assert "config.json" not in sizes, "from_pretrained must not take this for a whole model"
    for name in (BUNDLE, "model.safetensors"):
        assert 4 * learning < sizes[name] < 4 * learning + 2000
    assert sizes["optimizer.pt"] < 2 * 4 * learning + 8000
    assert ff.Bundle.load(folder / BUNDLE).to_bytes() == ff.capture(whole.model).to_bytes()


def test_save_model_writes_a_bundle_that_any_copy_of_the_base_takes(
    whole: Any, tmp_path: Path
) -> None:
    whole.save_model(str(tmp_path / "out"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {BUNDLE, "training_args.bin"}
    served = ff.attach(bert(), ff.Bundle.load(tmp_path / "out" / BUNDLE))
    assert torch.equal(logits(served), logits(whole.model))


@pytest.mark.parametrize("kind", ["plain", "groups and biases"])
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: str,
    whole: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(folder: str, *callbacks: Any) -> Any:
        if kind == "plain":
            return trainer(injected(), tmp_path / folder, *callbacks)
        model = injected(dataclasses.replace(CONFIG, bias="all"))
        groups = ff.parameter_groups(model, head_learning_rate=3e-3)
        optimizer = torch.optim.AdamW(groups)
        return trainer(model, tmp_path / folder, *callbacks, optimizers=(optimizer, None))

    if kind != "plain":
        whole = start("whole")
        whole.train()
    first = start("parts", StopAt(4))
    first.train()
    assert losses(first) == losses(whole)[:4]
    resumed = start("parts")
    before = resumed.model
    log = logging.getLogger("transformers")
    monkeypatch.setattr(log, "propagate", True)
    with caplog.at_level("INFO", "transformers"):
        resumed.train(resume_from_checkpoint=True)
    assert "Loading model from" in caplog.text
    assert "missing keys" not in caplog.text
    assert losses(resumed) == losses(whole)
    assert resumed.model is before
    assert ff.capture(resumed.model).to_bytes() == ff.capture(whole.model).to_bytes()


def test_the_best_checkpoint_comes_back_and_the_others_go(tmp_path: Path) -> None:
    run = trainer(
        injected(),
        tmp_path,
        tf.EarlyStoppingCallback(2),
        steps=40,
        learning_rate=0.5,  # too high: the evaluation loss soon rises
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
    )
    run.train()
    evaluated = [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]
    best = int(np.argmin(evaluated)) + 1
    assert run.state.global_step == best + 2 < 40, "early stopping ends the run"
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {
        f"checkpoint-{best}",
        f"checkpoint-{best + 2}",
    }
    stored = ff.Bundle.load(tmp_path / f"checkpoint-{best}" / BUNDLE)
    assert ff.capture(run.model).to_bytes() == stored.to_bytes()
    assert run.evaluate()["eval_loss"] == evaluated[best - 1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_change_no_loss(reentrant: bool, tmp_path: Path) -> None:
    curves = []
    kwargs = {"use_reentrant": reentrant}
    saving = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    for settings in ({}, saving):
        torch.manual_seed(5)
        model = ff.inject(bert(), CONFIG)
        start = ff.capture(model)
        run = trainer(model, tmp_path, save_strategy="no", **settings)
        run.train()
        assert model.is_gradient_checkpointing is bool(settings)
        curves.append((losses(run), ff.capture(model)))
    np.testing.assert_allclose(curves[1][0], curves[0][0], rtol=1e-6)
    for name, spectrum in curves[0][1].spectra.items():
        assert np.abs(spectrum - start.spectra[name]).max() > 1e-3, "every layer has learnt"
        np.testing.assert_allclose(curves[1][1].spectra[name], spectrum, rtol=1e-4, atol=1e-6)


# --- refusals


@pytest.mark.parametrize("what", ["name", "frozen", "more"])
def test_what_a_bundle_would_not_hold_is_refused_at_the_start(what: str, tmp_path: Path) -> None:
    model = injected()
    if what == "frozen":
        model = ff.attach(bert(), ff.capture(model))
        model.dropout.weight = nn.Parameter(torch.zeros(1))  # so that there is something to train
    elif what == "more":
        model.bert.pooler.requires_grad_(True)
    callback = ff.BundleCallback("other" if what == "name" else "default")
    with pytest.raises(UsageError) as caught:
        trainer(model, tmp_path, bundles=callback).train()
    if what == "more":
        assert caught.value.offenders == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"random_loc_seed": 778}, "seed: 777 in the checkpoint, 778 now"),
        ({"scaling": 41.0}, "scaling: 40.0 in the checkpoint, 41.0 now"),
        ({"seed": 1}, "base: other weights"),
        ({"name": "b"}, "found 'default'"),
    ],
)
def test_resuming_with_another_adapter_or_base_is_refused(
    change: dict[str, Any], says: str, whole: Any
) -> None:
    fields = {"random_loc_seed": 777, "scaling": 40.0}
    fields |= {key: change[key] for key in change if key in fields}
    config = ff.FourierFTConfig(n_frequency=20, task_type="SEQ_CLS", **fields)
    name = change.get("name", "default")
    model = injected(config, seed=change.get("seed", 0), name=name)
    folder = Path(whole.args.output_dir)
    run = trainer(model, folder, bundles=ff.BundleCallback(name))
    with pytest.raises(BaseMismatchError) as caught:
        run.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert says in " ".join((str(caught.value), *caught.value.offenders))


# --- the user's model stays the user's


def test_the_model_saves_as_its_class_does_without_the_adapter(tmp_path: Path) -> None:
    run = trainer(injected(), tmp_path / "run", steps=1, save_strategy="no")
    run.train()
    model = run.model
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path / "twin")
    assert {p.name for p in (tmp_path / "twin").iterdir()} == {BUNDLE}
    with torch.no_grad():
        next(iter(fourier_layers(twin).values())).adapter("default").spectrum.add_(1)
    twin.save_pretrained(tmp_path / "twin")
    changed = ff.Bundle.load(tmp_path / "twin" / BUNDLE)
    assert changed.to_bytes() == ff.capture(twin).to_bytes() != ff.capture(model).to_bytes()
    ff.detach(model).save_pretrained(tmp_path / "base")
    again = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(again), logits(bert()))


def test_release_gives_back_what_was_there(tmp_path: Path) -> None:
    model = injected()
    before = set(vars(model))
    keys = set(model.state_dict())
    callback = ff.BundleCallback()
    run = trainer(model, tmp_path, bundles=callback, steps=1, save_strategy="no")
    run.train()
    assert set(model.state_dict()) == keys
    assert "save_pretrained" in vars(model)
    callback.release(model)
    with pytest.raises(UsageError, match="a model without adapters"):
        model.save_pretrained(tmp_path / "whole")
    assert "_fourierft_diverted" not in vars(model)
    assert before <= set(vars(model))
    assert not model._load_state_dict_post_hooks


def test_the_trainer_saves_checkpoints_without_our_callback(tmp_path: Path) -> None:
    """`save_pretrained` is refused to all but the Trainer, which resumes from its own file."""
    settings = {"bundles": tf.TrainerCallback(), "steps": 2, "save_steps": 1}
    run = trainer(injected(), tmp_path, **settings)
    run.train()
    with pytest.raises(UsageError, match="a model without adapters"):
        run.model.save_pretrained(tmp_path / "other")
    again = trainer(injected(), tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert ff.capture(again.model).to_bytes() == ff.capture(run.model).to_bytes()


class Plain(nn.Module):
    """A model that is not transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 200)
        self.head = nn.Linear(200, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        scores = self.head(torch.relu(self.body(x)))
        if labels is None:
            return {"logits": scores}
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def test_a_plain_model_resumes_from_kilobytes_too(tmp_path: Path) -> None:
    x = torch.rand((32, 8), generator=torch.Generator().manual_seed(0))
    data = [{"x": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(x)]

    def start(folder: str, *callbacks: Any) -> Any:
        torch.manual_seed(0)
        config = ff.FourierFTConfig(n_frequency=30, target_modules=["body"])
        return trainer(ff.inject(Plain(), config), tmp_path / folder, *callbacks, data=data)

    whole = start("whole")
    whole.train()
    for callbacks in ((StopAt(4),), ()):
        parts = start("parts", *callbacks)
        parts.train(resume_from_checkpoint=not callbacks)
    assert losses(parts) == losses(whole)
    assert ff.capture(parts.model).to_bytes() == ff.capture(whole.model).to_bytes()
    folder = tmp_path / "whole" / "checkpoint-8"
    assert (folder / "model.safetensors").stat().st_size < 500 < 4 * 200 * 8
    assert ff.Bundle.load(folder / BUNDLE).to_bytes() == ff.capture(whole.model).to_bytes()

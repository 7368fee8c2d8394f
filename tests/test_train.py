"""Recovery: the losses against plain formulas, what trains, what is kept, resume after a kill, two processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import recovery_job
import torch
from conftest import FAMILIES, output
from torch.nn import functional

import tinycomp as tc
from tinycomp.layers import LAYERS
from tinycomp.train.losses import Targets, Task, divergence, hidden_error, objective
from tinycomp.train.samples import Samples
from tinycomp.train.teacher import hidden_targets, match_blocks

TESTS = Path(__file__).parent


def answers(logits: torch.Tensor, k: int, temperature: float = 1.0) -> Targets:
    values, indices = logits.topk(k, dim=1)
    return Targets(values, indices, (logits / temperature).logsumexp(1), None, [])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_with_all_classes_is_the_textbook_one(temperature):
    teacher, student = torch.randn(2, 7, 11).unbind()
    expected = functional.kl_div(
        (student / temperature).log_softmax(1), (teacher / temperature).log_softmax(1), reduction="sum", log_target=True
    )
    found = divergence(student, answers(teacher, 11, temperature), temperature)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_divergence_with_few_classes_is_a_lower_bound_and_zero_for_the_teacher_itself():
    teacher, student = torch.randn(2, 7, 50).unbind()
    full = float(divergence(student, answers(teacher, 50), 1.0))
    bounds = [float(divergence(student, answers(teacher, k), 1.0)) for k in (1, 5, 20, 50)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(full)
    assert float(divergence(teacher, answers(teacher, 5), 1.0)) == pytest.approx(0.0, abs=1e-5)


def test_padding_changes_no_term():
    task, config = Task("causal"), tc.Distill(kl=1.0, ce=0.5, hidden=0.7)
    ids = torch.randint(0, 9, (2, 6))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    rows = [{k: v[i] for k, v in short.items()} for i in range(2)]
    longer = {"input_ids": torch.zeros(10, dtype=torch.int64), "labels": torch.zeros(10, dtype=torch.int64)}
    padded = Samples([*rows, longer], 0, 0).collate([*rows, longer])
    padded = {k: v[:2] for k, v in padded.items()}
    logits, h, target = torch.randn(2, 10, 9), torch.randn(2, 10, 4), torch.randn(2, 6, 4)

    def value(batch: dict[str, torch.Tensor], length: int) -> dict[str, float]:
        mask = task.real(batch, length)
        teacher = torch.linspace(0, 1, 10 * 9).reshape(10, 9)
        targets = answers(teacher, 3)
        targets.hidden, targets.scales = [target.reshape(12, 4)], [2.0]
        with torch.no_grad():
            found = objective(
                task, logits[:, :length], [h[:, :length]], [mask], batch, targets, task.counts(batch), config
            )
        return found[1] | {"total": float(found[0])}

    assert value(padded, 10) == pytest.approx(value(short, 6), rel=1e-6)
    assert set(value(short, 6)) == {"kl", "ce", "hidden", "total"}
    plain = functional.cross_entropy(logits[:, :5].reshape(10, 9), ids[:, 1:].flatten())
    assert value(short, 6)["ce"] == pytest.approx(float(plain), rel=1e-6)


def test_hidden_error_weighs_blocks_by_the_teachers_variance():
    h, target = torch.randn(2, 3, 5, 4).unbind()
    mask = torch.ones(3, 5, dtype=torch.bool)
    targets = Targets(None, None, None, [target.reshape(-1, 4), 100 * target.reshape(-1, 4)], [1.0, 1e4])
    found = hidden_error([h, 100 * h], [mask, mask], targets)
    assert float(found) == pytest.approx(3 * float((h - target).pow(2).mean()), rel=1e-5)


def test_accumulated_batches_add_up_to_one_large_batch():
    task, config = Task("causal"), tc.Distill(kl=0.0, ce=1.0)
    ids = torch.randint(0, 9, (4, 6))
    labels = ids.clone()
    labels[0, 2:] = -100
    logits, batch = torch.randn(4, 6, 9), {"input_ids": ids, "labels": labels}
    counts, nothing = task.counts(batch), Targets(None, None, None, None, [])
    whole, _ = objective(task, logits, [], [], batch, nothing, counts, config)
    parts = [
        objective(task, logits[i : i + 2], [], [], {k: v[i : i + 2] for k, v in batch.items()}, nothing, counts, config)
        for i in (0, 2)
    ]
    assert float(sum(p for p, _ in parts)) == pytest.approx(float(whole), rel=1e-6)


def test_blocks_are_matched_with_those_they_came_from():
    signs = [{"norm": torch.randn(8), "up.bias": torch.randn(16)} for _ in range(6)]
    kept = [0, 2, 5]
    narrower = [{"norm": signs[i]["norm"] + 0.01, "up.bias": torch.zeros(12)} for i in kept]
    assert match_blocks(narrower, signs) == kept
    assert hidden_targets(kept, 6) == [1, 4, 5]
    assert match_blocks([{}] * 3, [{}] * 6) == [0, 2, 5]
    with pytest.raises(ValueError, match="6 blocks and a teacher with 3"):
        match_blocks(signs, signs[:3])


WRITERS = {
    "llama": "model.layers.2.mlp.down_proj",
    "gpt2": "transformer.h.2.mlp.c_proj",
    "bert": "bert.encoder.layer.2.output.dense",
}


def healed(student: Any, teacher: Any, **fields: Any) -> Any:
    config = tc.Distill(steps=0, hidden=1.0, kl=0.0, heal_samples=30, **fields)
    return tc.recover_(student, teacher, recovery_job.data(), config, progress=False)


@pytest.mark.parametrize("family", sorted(WRITERS))
@pytest.mark.parametrize("factored", [False, True])
def test_closed_form_repairs_a_damaged_writer(family, factored):
    """The linear that writes the last block's result is damaged; refitting it alone can undo nearly all of that."""
    teacher = FAMILIES[family].build(hidden_dropout_prob=0.0) if family == "bert" else FAMILIES[family].build()
    student = copy.deepcopy(teacher)
    name = WRITERS[family]
    module = student.get_submodule(name)
    if factored:
        weight = module.weight if isinstance(module, torch.nn.Linear) else module.weight.T
        q, r = torch.linalg.qr(weight.detach().T.contiguous())
        layer = LAYERS["LowRankLinear"].from_factors(q.T.contiguous(), r.T.contiguous(), None, module.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(student.get_submodule(parent), leaf, layer)
        module = layer.up
    with torch.no_grad():
        module.weight.mul_(0.5)
    report = healed(student, teacher)
    assert report.loss_healed < 0.15 * report.loss_before
    assert [r["path"] for r in report.healed if r["error_left"] < 0.2] == [name]
    assert report.loss_after == pytest.approx(report.loss_healed)


def test_closed_form_changes_only_the_link_of_cur():
    student, teacher = recovery_job.models()[1], FAMILIES["llama"].build()
    config = tc.CUR(preset="paper", targets=("re:.*layers.1.mlp.down_proj",))
    tc.compress_(student, config, recovery_job.data()[:2], progress=False)
    cur = [m for m in student.modules() if type(m).__name__ == "CURLinear"]
    before = [(m.c.weight.clone(), m.r.weight.clone(), m.u.weight.clone()) for m in cur]
    healed(student, teacher)
    for layer, (c, r, u) in zip(cur, before, strict=True):
        assert torch.equal(layer.c.weight, c)
        assert torch.equal(layer.r.weight, r)
        assert not torch.equal(layer.u.weight, u)
    assert cur


def test_training_helps_and_leaves_everything_else_as_it_was():
    student, teacher = recovery_job.models()
    before, names = recovery_job.state(student), [n for n, _ in student.named_modules()]
    flags = [p.requires_grad for p in student.parameters()]
    kept = recovery_job.state(teacher)
    config = recovery_job.CONFIG.model_copy(update={"steps": 30, "eval_every": 10})
    report = tc.recover_(student, teacher, recovery_job.data(), config, progress=False)
    assert report.loss_after < 0.9 * report.loss_before
    assert [c["step"] for c in report.curve] == [0, 10, 20, 30]
    assert report.loss_after == pytest.approx(min(c["loss"] for c in report.curve), rel=1e-5)
    assert [n for n, _ in student.named_modules()] == names
    assert [p.requires_grad for p in student.parameters()] == flags
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert all(torch.equal(v, kept[n]) for n, v in teacher.named_parameters())
    assert any(not torch.equal(v, before[n]) for n, v in student.named_parameters())
    assert not student.training


@pytest.mark.parametrize("train", ["factors", "lora"])
def test_only_the_chosen_parameters_change(train):
    student, teacher = recovery_job.models()
    before = recovery_job.state(student)
    config = tc.Distill(train=train, hidden=1.0, steps=8, eval_every=2, learning_rate=1e-3, heal=False)
    config = config.model_copy(update={"dtype": "bfloat16"})
    report = tc.recover_(student, teacher, recovery_job.data(), config, progress=False)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    inside = {n for n in before if ".up." in n or ".down." in n or (train == "lora" and "_proj" in n)}
    assert changed
    assert changed <= inside
    assert list(before) == [n for n, _ in student.named_parameters()]
    if train == "factors":
        assert report.trained_parameters == sum(before[n].numel() for n in inside)
    logits = output(student, "llama")
    assert logits.dtype == torch.float32  # autocast is off again
    judged = tc.recover_(student, teacher, recovery_job.data(), config.model_copy(update={"steps": 0}), progress=False)
    assert judged.loss_before == pytest.approx(report.loss_after, rel=1e-5)


def test_healing_comes_before_the_adapters(tmp_path):
    """And a resumed run, which attaches adapters anew, gives the same."""
    found = []
    for attempt in range(2):
        student, teacher = FAMILIES["llama"].build(), FAMILIES["llama"].build()
        with torch.no_grad():
            student.model.layers[2].mlp.down_proj.weight.mul_(0.5)
        config = tc.Distill(train="lora", hidden=1.0, steps=4, eval_every=2, learning_rate=1e-4, heal_samples=30)
        report = tc.recover_(
            student, teacher, recovery_job.data(), config, output_dir=tmp_path, resume=bool(attempt), progress=False
        )
        assert report.loss_after <= report.loss_healed < 0.2 * report.loss_before
        found.append(recovery_job.state(student))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_only_u_trains_in_cur_layers():
    teacher = FAMILIES["llama"].build()
    student = copy.deepcopy(teacher)
    tc.compress_(student, tc.CUR(preset="paper"), recovery_job.data()[:2], progress=False)
    before = recovery_job.state(student)
    config = tc.Distill(preset="paper", steps=4, batch_size=4, eval_every=2)
    assert (config.train, config.hidden, config.ce, config.kl, config.learning_rate) == ("u", 0.9, 0.1, 0.0, 3e-4)
    tc.recover_(student, teacher, recovery_job.data(), config, progress=False)
    changed = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.endswith(".u.weight") for n in changed)
    with pytest.raises(ValueError, match=r"train='u'.*no such parameter.*\"lora\""):
        tc.recover_(copy.deepcopy(teacher), teacher, recovery_job.data(), config, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [1e-3, 30.0])
def test_held_out_loss_never_ends_worse(dtype, rate):
    """Also at a rate that blows the weights up, and when the result is rounded to the model's own dtype."""
    student, teacher = (m.to(dtype) for m in recovery_job.models())
    config = tc.Distill(steps=6, eval_every=2, learning_rate=rate, max_grad_norm=0.0, warmup_steps=0, heal=False)
    report = tc.recover_(student, teacher, recovery_job.data(), config, progress=False)
    again = tc.recover_(student, teacher, recovery_job.data(), config.model_copy(update={"steps": 0}), progress=False)
    assert again.loss_before == pytest.approx(report.loss_after, rel=1e-6)
    assert report.loss_after <= report.loss_before
    assert {p.dtype for p in student.parameters()} == {dtype}
    if rate == 30.0:
        assert max(c["loss"] for c in report.curve) > report.loss_before


def test_early_stop_ends_a_run_that_does_not_improve():
    student, teacher = recovery_job.models()
    config = tc.Distill(steps=40, eval_every=2, patience=2, learning_rate=1.0, warmup_steps=0, heal=False)
    report = tc.recover_(student, teacher, recovery_job.data(), config, progress=False)
    assert report.steps == report.best_step + 4 < 40


def test_the_teacher_is_not_needed_once_its_answers_are_stored(tmp_path):
    student, teacher = recovery_job.models()
    other = copy.deepcopy(student)
    config = recovery_job.CONFIG
    tc.cache_teacher(teacher, recovery_job.data(), tmp_path / "answers", config, progress=False)
    tc.recover_(student, tmp_path / "answers", recovery_job.data(), config, progress=False)
    tc.recover_(other, teacher, recovery_job.data(), config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="answers other samples or other settings"):
        tc.recover_(student, tmp_path / "answers", recovery_job.data()[:4], config, progress=False)
    with pytest.raises(ValueError, match="another teacher"):
        tc.cache_teacher(student, recovery_job.data(), tmp_path / "answers", config, progress=False)


def test_labels_alone_train_a_classifier():
    model = FAMILIES["bert"].build()
    ids = torch.randint(3, 60, (40, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": ids, "labels": (ids[:, 0] > 30).long()}]
    config = tc.Distill(kl=0.0, ce=1.0, steps=30, eval_every=10, learning_rate=3e-3)
    report = tc.recover_(model, None, data, config, progress=False)
    assert report.loss_after < 0.8 * report.loss_before
    assert report.terms_after["ce"] == pytest.approx(report.loss_after, rel=1e-5)


@pytest.mark.parametrize("family", ["t5", "vit", "dinov2", "distilbert"])
def test_other_architectures(family):
    teacher = FAMILIES[family].build()
    student = copy.deepcopy(teacher)
    batches = [FAMILIES[family].batch(seed) for seed in range(8)]
    tc.compress_(student, tc.SVD(ratio=0.5), batches[:2], progress=False)
    config = tc.Distill(
        kl=0.0 if family == "dinov2" else 1.0, hidden=1.0, steps=8, eval_every=4, batch_size=4, learning_rate=1e-3
    )
    report = tc.recover_(student, teacher, batches, config, progress=False)
    assert report.loss_after < report.loss_before


def test_mistakes_are_named():
    student, teacher = recovery_job.models()
    data = recovery_job.data()
    with pytest.raises(ValueError, match="no teacher with kl or hidden"):
        tc.recover_(student, None, data, progress=False)
    with pytest.raises(ValueError, match="same object"):
        tc.recover_(student, student, data, progress=False)
    with pytest.raises(ValueError, match="at least one batch of 64"):
        tc.recover_(student, teacher, data, tc.Distill(batch_size=64), progress=False)
    with pytest.raises(ValueError, match="kl, ce and hidden all 0"):
        tc.Distill(kl=0.0)
    with pytest.raises(ValueError, match="same head"):
        tc.recover_(student, FAMILIES["llama"].build(vocab_size=80), data, progress=False)
    bare = FAMILIES["dinov2"].build()
    images = [FAMILIES["dinov2"].batch(s) for s in range(8)]
    with pytest.raises(ValueError, match="without class logits"):
        tc.recover_(bare, copy.deepcopy(bare), images, tc.Distill(batch_size=2), progress=False)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    student, teacher = recovery_job.models()
    before = recovery_job.state(student)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tinycomp.train.trainer._Schedule.on_step_end", fail)
    with pytest.raises(KeyboardInterrupt):
        tc.recover_(student, teacher, recovery_job.data(), recovery_job.CONFIG, progress=False)
    assert all(torch.equal(v, before[n]) for n, v in student.named_parameters())

"""Recoveries that cannot work are refused before work is done, and what is finished is not lost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import recovery_job
import torch
from command_line import run
from conftest import FAMILIES
from filelock import FileLock
from tiny_folder import write_folder

import tinycomp as tc
from tinycomp.train.teacher import Teacher, block_signs

SMALL = ["--num-samples", "24", "--max-seq-length", "16", "--set", "batch_size=4", "--set", "heal=false"]


def classifier() -> tuple[Any, Any, list[dict[str, torch.Tensor]]]:
    """(student, teacher, labelled data)."""
    teacher = FAMILIES["bert"].build(num_labels=3)
    data = [
        batch | {"labels": batch["input_ids"][:, 1] % 3}
        for batch in ({"input_ids": torch.randint(3, 60, (6, 10))} for _ in range(4))
    ]
    student = copy.deepcopy(teacher)
    tc.compress_(student, tc.SVD(ratio=0.5), [{"input_ids": data[0]["input_ids"]}], progress=False)
    return student, teacher, data


def refusal(model: Any, teacher: Any, data: Any, **fields: Any) -> str:
    """The message; the model is as it was."""
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its message is what callers assert)
        recover(model, teacher, data, **fields)
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in model.named_parameters())
    return str(caught.value)


def recover(model: Any, teacher: Any, data: Any, output_dir: Any = None, **fields: Any) -> Any:
    config = tc.Distill(batch_size=2, steps=2, **fields)
    return tc.recover_(model, teacher, data, config, output_dir=output_dir, progress=False)


def test_labels_are_checked():
    student, teacher, data = classifier()
    bare = [{"input_ids": b["input_ids"]} for b in data]
    assert "sample 0 without labels" in refusal(student, None, bare, kl=0.0, ce=1.0)
    assert "sample 0 without labels" in refusal(student, teacher, bare, kl=1.0, ce=1.0)
    wrong = [*data[:3], data[3] | {"labels": torch.full((6,), 3)}]
    assert "the label 3, allowed are 0 to 2, or -100" in refusal(student, teacher, wrong, ce=1.0)
    wide = refusal(student, teacher, [b | {"labels": b["labels"][:, None]} for b in data], ce=1.0)
    assert "labels of shape (1, 1)" in wide
    assert "of shape (1,)" in wide
    real = [b | {"labels": b["labels"].float()} for b in data]
    assert "dtype torch.float32" in refusal(student, teacher, real, ce=1.0)
    ignored = [*data[:2], data[2] | {"labels": torch.full((6,), -100)}, data[3]]
    report = recover(student, teacher, ignored, kl=0.0, ce=1.0)
    assert report.steps == 2
    assert 0 < report.terms_before["ce"] < 100


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    student, teacher = recovery_job.models()
    data = recovery_job.data()
    broken = copy.deepcopy(teacher)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0] = float("nan")
    assert "its answers are not finite" in refusal(copy.deepcopy(student), broken, data)
    wrong = copy.deepcopy(student)
    with torch.no_grad():
        wrong.model.norm.weight[0] = float("nan")
    assert "not finite before anything was done" in refusal(wrong, teacher, data, output_dir=tmp_path)
    assert recover(student, teacher, data, output_dir=tmp_path).steps == 2  # the refused job has not taken the folder


def test_teachers_of_another_width_are_refused_where_blocks_are_compared():
    student, _ = recovery_job.models()
    wide = FAMILIES["llama"].build(hidden_size=128, num_attention_heads=8)
    assert "numbers a token and the teacher's 128" in refusal(student, wide, recovery_job.data())
    assert recover(student, wide, recovery_job.data(), heal=False).steps == 2


def test_blocks_are_matched_after_dropping_and_narrowing(tmp_path):
    """Biases of narrower feed-forward parts differ in size; norms still say which block is which."""
    teacher = FAMILIES["gpt2"].build(n_layer=5)
    with torch.no_grad():
        for block in teacher.transformer.h:
            for p in block.parameters():
                p.add_(torch.randn_like(p) * 0.1)
    data = [{"input_ids": torch.randint(3, 60, (4, 12))} for _ in range(4)]
    config = tc.Distill(batch_size=2, hidden=1.0)
    tc.cache_teacher(teacher, data, tmp_path, config, progress=False)
    student = copy.deepcopy(teacher)
    ignore = (r"re:transformer\.h\.[0234]\..*",)
    tc.compress_(student, [tc.StrategicFusion(drop=1, strategy="top", ignore=ignore)], data, progress=False)
    tc.compress_(student, tc.WidthPrune(ratio=0.5), data, progress=False)
    spec = tc.models.spec_of(student)
    assert len({tuple(v.shape) for s in (block_signs(m, tc.models.spec_of(m))[0] for m in (student, teacher))
                for b in s for n, v in b.items() if n == "mlp.c_fc.bias"}) > 1  # fmt: skip
    answers = Teacher(tmp_path)
    answers.fit(student, spec, hidden=True)
    assert answers.places == [1, 2, 3, 4]  # block 0 stands for 0 and the dropped 1


def test_wrong_settings_are_refused_before_the_teacher_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model")
    assert run("compress", "model", "--method", "svd", "--ratio", 0.5, "--output-dir", "small",
               "--num-calibration-samples", 4, "--max-seq-length", 16).exit_code == 0  # fmt: skip
    words = ["recover", "small", "--teacher", "model", "--output-dir", "out", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("tinycomp.train.recover.store", lambda *_: pytest.fail("the teacher was asked"))
        schedule = run(*words, "--set", "schedule=nonsense")
        assert schedule.exit_code == 2
        assert "'cosine'" in schedule.output
        links = run(*words, "--train", "u")
        assert links.exit_code == 3
        assert '"lora" and "all", and "factors"' in " ".join(links.output.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "small"]
    done = run(*words, "--steps", 2)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "small"]


def test_finished_answers_survive_interruptions_and_refusals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model")
    words = ["recover", "model", "--teacher", "model", "--output-dir", "out", *SMALL]
    work = tmp_path / ".out.tinycomp-recovery"

    def answers() -> list[str]:
        return sorted(p.name for p in work.glob("teacher/sample-*"))

    import tinycomp.train.teacher as module

    ask, calls = module._answer, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        ask(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_answer", interrupted)
        stopped = run(*words, "--steps", 2)
    assert stopped.exit_code == 130
    assert "--resume continues" in " ".join(stopped.output.split())
    assert "nothing was written" not in stopped.output
    kept = answers()
    assert len(kept) == 8
    other = run(*words, "--steps", 2, "--resume", "--num-samples", 20)
    assert other.exit_code == 3
    assert answers() == kept
    calls.clear()
    with FileLock(tmp_path / ".out.tinycomp-lock"):
        busy = run(*words, "--steps", 2, "--resume")
    assert busy.exit_code == 3
    assert "another process is writing" in busy.output
    assert answers() == kept
    done = run(*words, "--steps", 2, "--resume")
    assert done.exit_code == 0, done.output
    assert not work.exists()
    report = json.loads((tmp_path / "out" / "tinycomp_report.json").read_text(), parse_constant=pytest.fail)
    assert report["steps"] == 2


def test_checkpoints_survive_an_interruption_where_there_is_no_teacher(tmp_path, monkeypatch):
    from tinycomp.train.trainer import _Schedule

    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "model")
    words = ["recover", "model", "--output-dir", "out", *SMALL, "--steps", 4, "--set", "eval_every=1"]
    words += ["--set", "kl=0", "--set", "ce=1"]
    before = _Schedule.on_pre_optimizer_step

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt
        before(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_Schedule, "on_pre_optimizer_step", stop)
        assert run(*words).exit_code == 130
    assert (tmp_path / ".out.tinycomp-recovery" / "checkpoint-2").is_dir()
    done = run(*words, "--resume")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / ".out.tinycomp-recovery").exists()


def test_a_run_that_stopped_early_stays_stopped_when_resumed(tmp_path):
    config = tc.Distill(
        steps=40, eval_every=1, patience=2, batch_size=4, learning_rate=30.0, heal=False, max_grad_norm=0
    )
    student, teacher = recovery_job.models()
    folder = str(tmp_path / "work")
    first = tc.recover_(student, teacher, recovery_job.data(), config, output_dir=folder, progress=False)
    assert first.steps < 40
    checkpoints = sorted(p.name for p in Path(folder).glob("checkpoint-*"))
    again, _ = recovery_job.models()
    second = tc.recover_(again, teacher, recovery_job.data(), config, output_dir=folder, resume=True, progress=False)
    assert (second.steps, second.best_step, second.loss_after) == (first.steps, first.best_step, first.loss_after)
    assert [c["step"] for c in second.curve] == [c["step"] for c in first.curve]
    assert sorted(p.name for p in Path(folder).glob("checkpoint-*")) == checkpoints
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), student.parameters(), strict=True))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "constant_with_warmup",
                                      "cosine_with_restarts", "inverse_sqrt"])  # fmt: skip
def test_every_schedule_runs_and_decay_follows_its_own(schedule, monkeypatch):
    from tinycomp.train.trainer import _Schedule

    seen: list[float] = []
    before = _Schedule.on_pre_optimizer_step

    def watched(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        seen.append(max(g["weight_decay"] for g in kwargs["optimizer"].param_groups))

    monkeypatch.setattr(_Schedule, "on_pre_optimizer_step", watched)
    student, teacher = recovery_job.models()
    config = tc.Distill(
        steps=5, eval_every=5, batch_size=4, heal=False, schedule=schedule, weight_decay=0.1, weight_decay_end=0.5
    )
    tc.recover_(student, teacher, recovery_job.data(), config, progress=False)
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])

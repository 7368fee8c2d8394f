"""The transformers plug-in: ties, guards, plans that grow, training, generation, adapters, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import (
    check_round_trip,
    drop_one,
    is_plain,
    narrow_all,
    narrowed,
    quantization_config,
    reload,
    replace_some,
    replaced,
    run,
    stored_bytes,
)
from conftest import BLOCKS, FAMILIES, WIDTH, output
from safetensors import safe_open
from torch import nn

from tinycomp.edits import Drop, Edit, Plan, Set, Tie
from tinycomp.hf import TinycompConfig, attach_, check_compressible, edit_, plan_of, register
from tinycomp.models import Stack, config_after_drop, spec_of
from tinycomp.surgery import apply_


def narrow_stack(model: nn.Module, stack: Stack, keep: int) -> None:
    edits: list[Edit] = []
    tensors: dict[str, torch.Tensor] = {}
    for block in stack.blocks:
        assert block.ffn is not None
        more, values = narrowed(model, block.ffn, keep)
        edits, tensors = edits + more, tensors | values
    run(model, edits, tensors)


def test_ties_are_stored_once_and_stay_ties(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    whole = sum(t.nbytes for t in {t.data_ptr(): t for t in model.state_dict().values()}.values())
    mlp = sum(p.nbytes for p in model.model.layers[0].mlp.parameters())
    run(model, [Tie("model.layers.1.mlp", to="model.layers.0.mlp"), Tie("model.layers.2.mlp", to="model.layers.0.mlp")])
    loaded = check_round_trip(model, "llama", tmp_path)
    assert stored_bytes(tmp_path / "first") == whole - 2 * mlp
    assert loaded.model.layers[2].mlp is loaded.model.layers[0].mlp
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    tensors = safe_open(tmp_path / "first" / "model.safetensors", "pt").keys()
    assert "lm_head.weight" not in tensors
    assert [n for n in tensors if ".layers.2.mlp." in n] == ["model.layers.2.mlp.gate_proj.weight"]  # the guard


def test_tied_modules_with_replaced_linears_and_a_later_drop(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    run(model, [Tie("model.layers.2.mlp", to="model.layers.1.mlp")])
    replace_some(model, step=2)
    drop_one(model, index=0)
    loaded = check_round_trip(model, "llama", tmp_path)
    assert loaded.model.layers[1].mlp is loaded.model.layers[0].mlp
    plan = plan_of(loaded)
    assert plan is not None
    assert [(e.path, e.to) for e in plan.edits if isinstance(e, Tie)] == [("model.layers.1.mlp", "model.layers.0.mlp")]


def test_second_compression_extends_the_plan(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("qwen3")
    narrow_all(model, (40,))
    assert plan_of(model) is None
    replace_some(model, step=5)
    model.save_pretrained(tmp_path / "once")
    again = reload("qwen3", tmp_path / "once")
    drop_one(again, index=0)
    replace_some(again, step=4, seed=9)
    loaded = check_round_trip(again, "qwen3", tmp_path)
    plan = plan_of(loaded)
    assert plan is not None
    assert [m["seed"] for m in plan.methods] == [0, 9]
    assert loaded.config.num_hidden_layers == 2


def test_dropping_the_only_compressed_block_makes_the_model_plain_again(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("llama")
    path = "model.layers.1.mlp.up_proj"
    edit, tensors = replaced(model, path, 0)
    run(model, [edit], tensors)
    assert plan_of(model) is not None
    drop_one(model, index=1)
    assert plan_of(model) is None
    check_round_trip(model, "llama", tmp_path)
    assert is_plain(tmp_path / "first")


def test_widths_of_one_stack_alone_are_not_in_the_shared_field(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("t5")  # one d_ff for both stacks
    narrow_stack(model, spec_of(model).stacks[0], 20)
    loaded = check_round_trip(model, "t5", tmp_path)
    assert loaded.config.d_ff == WIDTH
    assert not is_plain(tmp_path / "first")
    model = tiny("marian")  # a field for each stack
    narrow_stack(model, spec_of(model).stacks[1], 20)
    check_round_trip(model, "marian", tmp_path / "marian")
    assert is_plain(tmp_path / "marian" / "first")
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (WIDTH, 20)


def test_bare_model_and_model_with_a_head_read_each_others_checkpoints(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("bert")
    run(model, [Tie("bert.encoder.layer.2.output", to="bert.encoder.layer.1.output")])
    replace_some(model)
    model.save_pretrained(tmp_path / "head")
    bare, info = transformers.AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert (info["missing_keys"], info["unexpected_keys"]) == (set(), {"classifier.weight", "classifier.bias"})
    assert bare.encoder.layer[2].output is bare.encoder.layer[1].output
    batch = FAMILIES["bert"].batch()
    with torch.no_grad():
        want = model.bert(**batch).last_hidden_state
        assert torch.equal(bare(**batch).last_hidden_state, want)
    bare.save_pretrained(tmp_path / "bare")
    paths = [edit["path"] for edit in quantization_config(tmp_path / "bare")["edits"]]
    assert paths
    assert all(path.startswith("encoder.layer") for path in paths)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bare")
    with torch.no_grad():
        assert torch.equal(again.bert(**batch).last_hidden_state, want)
    t5 = tiny("t5")
    replace_some(t5)
    t5.save_pretrained(tmp_path / "t5")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "t5")
    ids = FAMILIES["t5"].batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, t5.encoder(ids).last_hidden_state)


def test_loading_in_another_dtype_casts_floats_and_no_integers(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    replace_some(model)
    model.save_pretrained(tmp_path)
    loaded = reload("llama", tmp_path, dtype=torch.bfloat16, device_map="cpu")
    for name, tensor in loaded.state_dict().items():
        original = model.state_dict()[name]
        assert tensor.dtype == (torch.bfloat16 if original.is_floating_point() else original.dtype), name
        assert torch.equal(tensor, original.to(tensor.dtype)), name
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.bfloat16, torch.int32, torch.uint8, torch.int8}
    assert torch.isfinite(output(loaded, "llama")).all()


def test_sharded_checkpoints_and_copies(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    run(model, [Tie("model.layers.2.mlp", to="model.layers.0.mlp")])
    replace_some(model)
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(output(reload("llama", tmp_path), "llama"), output(model, "llama"))


def test_generation_equals_the_uncompiled_model_with_both_caches(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny("llama")
    drop_one(model)
    narrow_all(model, (30, 40))
    replace_some(model)
    model.save_pretrained(tmp_path)
    loaded = reload("llama", tmp_path)
    ids = FAMILIES["llama"].batch()["input_ids"]
    plain = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, use_cache=False, **plain)
    assert torch.equal(loaded.generate(ids, **plain), want)
    assert torch.equal(loaded.generate(ids, cache_implementation="static", disable_compile=True, **plain), want)
    assert loaded.hf_quantizer.is_compileable
    torch._dynamo.reset()
    compiled = torch.compile(loaded, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids).logits, loaded(ids).logits)


def test_trainer_takes_a_step_and_its_checkpoint_loads(tiny: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    model = tiny("llama")
    run(model, [Tie("model.layers.2.mlp", to="model.layers.0.mlp")])
    replace_some(model)
    model.save_pretrained(tmp_path / "start")
    model = reload("llama", tmp_path / "start")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in model.state_dict() if n.endswith((".r.weight", ".c.weight"))}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = FAMILIES["llama"].batch()["input_ids"]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        save_strategy="steps",
        save_steps=1,
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in frozen), name
    loaded = reload("llama", tmp_path / "run" / "checkpoint-1")
    assert torch.equal(output(loaded, "llama"), output(model.eval(), "llama"))


def test_adapters_attach_to_a_loaded_model(tiny: Callable[..., Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny("llama")
    edits: list[Edit] = []
    tensors: dict[str, torch.Tensor] = {}
    for index in range(BLOCKS):
        edit, values = replaced(model, f"model.layers.{index}.mlp.up_proj", 0)
        edits, tensors = [*edits, edit], tensors | values
    run(model, edits, tensors)
    model.save_pretrained(tmp_path)
    loaded = reload("llama", tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["down", "up", "q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(loaded, config)
    assert not torch.allclose(output(adapted, "llama"), output(model, "llama"), atol=1e-3)
    adapted(**FAMILIES["llama"].batch()).logits.square().sum().backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    with pytest.raises(ValueError, match="merge_and_unload"):
        check_compressible(adapted)
    with pytest.raises(ValueError, match="merge_and_unload"):
        check_compressible(loaded)


def test_weights_that_are_not_ours_are_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("llama")
    check_compressible(model)
    replace_some(model)
    check_compressible(model)
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match=r"quantised by gptq.*dequantize\(\)"):
        check_compressible(model)
    with pytest.raises(ValueError, match="_orig_mod"):
        check_compressible(torch.compile(tiny("bert")))  # type: ignore[arg-type]


def test_what_no_reader_could_rebuild_is_refused(tiny: Callable[..., Any]) -> None:
    model = tiny("t5")  # its first block holds the position bias of all
    before = output(model, "t5"), model.config.to_dict(), [name for name, _ in model.named_modules()]
    slices, tensors = narrowed(model, spec_of(model).blocks[-1].ffn, 24)  # type: ignore[arg-type]
    spec = spec_of(model)
    drop = Drop(spec.stacks[-1].blocks[0].path, config=config_after_drop(model.config, spec, spec.stacks[-1], 0))
    with pytest.raises(ValueError, match="relative_attention_bias"):
        edit_(model, [(Plan(slices), tensors), (Plan([drop]), {})])
    assert torch.equal(output(model, "t5"), before[0])  # as it was, although its edits had succeeded
    assert (model.config.to_dict(), [name for name, _ in model.named_modules()]) == before[1:]
    model = tiny("llama")
    with pytest.raises(ValueError, match="a reader without tinycomp would not notice"):
        run(model, [Set("model.layers.0.self_attn", attr="scaling", value=0.5)])
    assert model.model.layers[0].self_attn.scaling != 0.5
    model = tiny("llama")
    model.model.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"its own config does not describe \(model\.layers\.0\.extra"):
        check_compressible(model)
    with pytest.raises(ValueError, match=r"layers\.0\.extra.* absent for the reader"):
        attach_(model, Plan())
    assert plan_of(model) is None


def test_config_and_registration(tiny: Callable[..., Any]) -> None:
    register()
    register()
    config = TinycompConfig.from_plan(Plan([Drop("a.1")], [{"method": "x"}]))
    assert TinycompConfig.from_dict({**config.to_dict(), "field_of_a_newer_version": 1}).plan == config.plan
    with pytest.raises(ValueError, match="format_version 99"):
        _ = TinycompConfig(format_version=99).plan
    other = nn.Module()
    other.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
    plan = Plan([Drop("blocks.0")])
    apply_(other, plan)
    attach_(other, plan)
    assert plan_of(other) == plan


def test_uncompressed_checkpoint_with_our_config_is_refused(tiny: Callable[..., Any], tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        reload("llama", tmp_path, quantization_config=TinycompConfig.from_plan(Plan()))


_READER = """
import sys, torch, transformers
sys.modules["tinycomp"] = None  # importing it fails
root, *cases = sys.argv[1:]
for case in cases:
    auto = transformers.AutoModelForSequenceClassification if "bert" in case else transformers.AutoModelForCausalLM
    batch, want = torch.load(f"{root}/{case}/expected.pt")
    try:
        model = auto.from_pretrained(f"{root}/{case}")
    except Exception as error:
        print("RESULT", case, "raised", type(error).__name__)
        continue
    with torch.no_grad():
        print("RESULT", case, "equal" if torch.equal(model(**batch).logits, want) else "different")
assert "tinycomp.hf" not in sys.modules
"""


def test_a_reader_without_tinycomp_fails_loudly_or_gets_the_right_logits(
    tiny: Callable[..., Any], tmp_path: Path
) -> None:
    def replace_one(model: Any, kind: int) -> None:
        path = spec_of(model).blocks[1].ffn.down  # type: ignore[union-attr]
        edit, tensors = replaced(model, path, kind)
        run(model, [edit], tensors)

    mlps = ("model.layers.2.mlp", "model.layers.1.mlp")
    cases: dict[str, tuple[Callable[[Any], Any], str]] = {
        "llama-lowrank": (lambda m: replace_one(m, 0), "raised"),
        "llama-cur": (lambda m: replace_one(m, 1), "raised"),
        "llama-swsc": (lambda m: replace_one(m, 2), "raised"),
        "llama-int8": (lambda m: replace_one(m, 6), "raised"),
        "llama-masked": (lambda m: replace_one(m, 5), "raised"),
        "gpt2-lowrank": (lambda m: replace_one(m, 0), "raised"),
        "llama-nonuniform": (lambda m: narrow_all(m, (30, 40)), "raised"),
        "llama-tie": (lambda m: run(m, [Tie(*mlps)]), "raised"),
        "llama-tied-norm": (
            lambda m: run(m, [Tie("model.layers.2.input_layernorm", "model.layers.1.input_layernorm")]),
            "raised",
        ),
        "llama-drop": (drop_one, "equal"),
        "llama-uniform": (lambda m: narrow_all(m, (32,)), "equal"),
        "bert-drop": (drop_one, "equal"),
        "bert-mixed": (replace_some, "raised"),
    }
    for case, (edit, _) in cases.items():
        family = case.split("-")[0]
        model = tiny(family)
        edit(model)
        model.save_pretrained(tmp_path / case)
        torch.save((FAMILIES[family].batch(), output(model, family)), tmp_path / case / "expected.pt")
    command = [sys.executable, "-c", _READER, str(tmp_path), *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    results = dict(line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("RESULT"))
    assert results == {case: result for case, (_, result) in cases.items()}

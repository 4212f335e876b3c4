"""Which weights load into which run, how the vocabulary grows, and every refusal by its message."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import UNK
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    Gemma3Config,
    GPT2Config,
    GraniteConfig,
    MptConfig,
    Phi3Config,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from coconut import Coconut
from dataset import MARKERS
from engine.config_file import load_config
from engine.metadata import Metadata
from engine.model import build_coconut, load_coconut, model_outline
from engine.model import load_backbone as load_backbone_from
from engine.weights import ModelSource
from utils import UserError, log

MODEL_TOKENS = 37
WINDOW = {"latent_window_size": 1, "latent_weights": [1.0], "window_scope": "sequence"}
GPT2_TOKENIZER = Path(__file__).parents[3] / "shared" / "models" / "gpt2-tokenizer"


@pytest.fixture
def configure(tmp_path):
    """`configure(model_id, **keys)`: a Config read from YAML; coconut unless keys name a method."""

    def build(model_id, **keys):
        values = {
            "name": "run", "save_path": str(tmp_path / "exps"), "model_id": str(model_id),
            "train_path": "train.json", "val_path": "val.json", "batch_size_training": 2,
            "num_epochs": 9, "c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 2,
        }  # fmt: skip
        if not {"coconut", "cot", "no_cot", "no_thoughts"} & keys.keys():
            values["coconut"] = True
        values |= {key: str(v) if isinstance(v, Path) else v for key, v in keys.items()}
        path = tmp_path / "config.yaml"
        path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in values.items()))
        return load_config(str(path))

    return build


def load_tokenizer(config):
    return ModelSource.of(config).tokenizer


def load_backbone(config):
    return load_backbone_from(config, ModelSource.of(config))


def load_quietly(config):
    """The backbone, where nothing must be logged."""
    with mock.patch.object(log, "info", lambda text: pytest.fail(f"unexpected line: {text}")):
        return load_backbone(config)


def save_checkpoint(folder, backbone, config, **changes):
    """A checkpoint directory of ours."""
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    metadata = Metadata.of(config, backbone.tokenizer).at(stage=1, epoch=0).model_dump() | changes
    (folder / "coconut.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture
def trained(configure, tiny_folder, tmp_path):
    """`trained(family, **keys)`: (backbone, model folder, checkpoint) with marker rows 7, 8, 9."""

    def build(family="gpt2", **keys):
        folder = tiny_folder(family)
        config = configure(folder, **keys)
        backbone = load_backbone(config)
        if config.method == "coconut":
            with torch.no_grad():
                for value, marker_id in zip((7, 8, 9), marker_ids(backbone), strict=True):
                    backbone.model.get_input_embeddings().weight[marker_id] = value
                    backbone.model.get_output_embeddings().weight[marker_id] = value
        checkpoint = save_checkpoint(tmp_path / "checkpoint_1", backbone, config)
        return backbone, folder, checkpoint

    return build


def marker_ids(backbone):
    return backbone.tokenizer.convert_tokens_to_ids(list(MARKERS))


def published_state(model):
    """The state dict as the published wrapper module has it."""
    state = {f"base_causallm.{name}": tensor for name, tensor in model.state_dict().items()}
    return state | {"embedding.weight": model.get_input_embeddings().weight.detach()}


def assert_same_weights(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


# The tokenizer


def test_markers_are_special_and_vanish_in_decoding(configure, tiny_folder):
    tokenizer = load_tokenizer(configure(tiny_folder()))
    assert tokenizer.convert_tokens_to_ids(list(MARKERS)) == [37, 38, 39]
    assert (tokenizer.padding_side, tokenizer.pad_token_id) == ("right", tokenizer.eos_token_id)
    text = f"{MARKERS[0]} {MARKERS[2]} {MARKERS[1]} 3 + 4"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True).strip() == "3 + 4"


def test_markers_that_a_tokenizer_had_as_plain_tokens_become_special(
    configure, tiny_folder, word_tokenizer
):
    folder = tiny_folder()
    word_tokenizer.add_tokens(list(MARKERS))
    word_tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(configure(folder))
    assert len(tokenizer) == 40
    assert tokenizer.decode([37, 39, 38, 5], skip_special_tokens=True).strip() == "3"


def test_tokenizer_special_tokens_of_its_own_stay_special(configure, tiny_folder, word_tokenizer):
    folder = tiny_folder()
    word_tokenizer.add_special_tokens({"extra_special_tokens": ["wumpus"]})
    word_tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(configure(folder))
    assert "wumpus" in tokenizer.all_special_tokens


def test_tokenizer_of_the_checkpoint_comes_before_that_of_model_id(
    configure, tiny_folder, trained, word_tokenizer
):
    _, folder, checkpoint = trained()
    word_tokenizer.add_tokens(["extra"])
    word_tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(configure(folder))) == 41
    assert len(load_tokenizer(configure(folder, load_model_path=checkpoint))) == 40


def test_tokenizer_without_eos_is_refused(configure, tiny_folder, word_tokenizer):
    folder = tiny_folder()
    word_tokenizer.eos_token = None
    word_tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="model_id: the tokenizer of .* has no EOS token"):
        load_tokenizer(configure(folder))


def test_a_hub_name_that_is_out_of_reach_is_refused_with_the_fix(configure):
    wanted = r"model_id: 'no/such-model' is not a local folder.*HF_HUB_OFFLINE is set.*local folder"
    with pytest.raises(UserError, match=wanted):
        load_tokenizer(configure("no/such-model"))


# Growing


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_new_rows_copy_the_named_token_on_both_sides(configure, tiny_folder, family):
    folder = tiny_folder(family)
    before = AutoModelForCausalLM.from_pretrained(folder)
    backbone = load_quietly(configure(folder, new_token_init="="))
    model, source = backbone.model, backbone.tokenizer.convert_tokens_to_ids("=")
    assert not backbone.has_markers and model.config.vocab_size == 40
    pairs = (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    )
    for weight, old in pairs:
        assert torch.equal(weight[:37], old)
        assert torch.equal(weight[37:], old[source].expand(3, -1))
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == (family == "gpt2")


def test_the_token_for_unknown_words_may_be_copied_like_any_other(configure, tiny_folder):
    # GPT-2's is its <|endoftext|>.
    backbone = load_quietly(configure(tiny_folder(), new_token_init=UNK))
    rows = backbone.model.get_input_embeddings().weight
    source = backbone.tokenizer.unk_token_id
    assert torch.equal(rows[37:], rows[source].expand(3, -1))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_new_rows_are_the_mean_where_the_token_is_unknown_and_the_log_says_so(
    configure, tiny_folder, family, caplog
):
    folder = tiny_folder(family)
    before = AutoModelForCausalLM.from_pretrained(folder)
    caplog.set_level("INFO", "coconut")
    model = load_backbone(configure(folder, new_token_init="no such word")).model
    for weight, old in (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.get_output_embeddings().weight, before.get_output_embeddings().weight),
    ):
        torch.testing.assert_close(weight[37:], old.mean(0).expand(3, -1))
    assert caplog.messages[0].startswith("new_token_init: 'no such word' is not one token")
    assert len(caplog.messages) == 1


def test_padded_vocabulary_keeps_its_rows_and_padding_stays_out_of_the_mean(configure, tiny_folder):
    folder = tiny_folder("llama", vocab_size=64)
    before = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    config = configure(folder, new_token_init="no such word")
    weight = load_backbone(config).model.get_input_embeddings().weight
    assert len(weight) == 64
    torch.testing.assert_close(weight[37:40], before[:37].mean(0).expand(3, -1))
    assert torch.equal(weight[40:], before[40:])


def test_bias_of_the_output_side_grows_too(configure, tiny_folder):
    folder = tiny_folder()
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=MODEL_TOKENS, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    config = configure(folder, new_token_init="=")
    backbone = load_quietly(config)
    source = backbone.tokenizer.convert_tokens_to_ids("=")
    bias = backbone.model.lm_head.bias
    assert torch.equal(bias[:37], model.lm_head.bias)
    assert torch.equal(bias[37:], model.lm_head.bias[source].expand(3))
    build_coconut(config, backbone)


@pytest.mark.parametrize("method", ["cot", "no_cot", "no_thoughts"])
def test_other_methods_leave_the_vocabulary_alone(configure, tiny_folder, method):
    backbone = load_quietly(configure(tiny_folder(), **{method: True}))
    assert backbone.model.get_input_embeddings().num_embeddings == 37


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loading_a_coconut_checkpoint_keeps_its_marker_rows(configure, trained, family):
    backbone, folder, checkpoint = trained(family)
    config = configure(folder, load_model_path=checkpoint)
    loaded = load_quietly(config)
    assert loaded.has_markers and loaded.source.metadata.method == "coconut"
    assert_same_weights(loaded.model, backbone.model)
    assert loaded.model.get_input_embeddings().weight[37:, 0].tolist() == [7, 8, 9]
    build_coconut(config, loaded)


@pytest.mark.parametrize("vocab_size", [37, 64])
def test_coconut_from_a_cot_checkpoint_gets_new_marker_rows(
    configure, tiny_folder, tmp_path, vocab_size
):
    folder = tiny_folder("llama", vocab_size=vocab_size)
    cot = configure(folder, cot=True)
    checkpoint = save_checkpoint(tmp_path / "cot", load_quietly(cot), cot)
    loaded = load_quietly(configure(folder, load_model_path=checkpoint, resume=1))
    weight = loaded.model.get_input_embeddings().weight
    assert not loaded.has_markers and len(weight) == max(40, vocab_size)
    source = loaded.tokenizer.convert_tokens_to_ids("<<")
    assert torch.equal(weight[37:40], weight[source].expand(3, -1))


def test_model_folder_that_knows_the_markers_keeps_its_rows(configure, trained):
    backbone, folder, checkpoint = trained()
    (checkpoint / "coconut.json").unlink()
    loaded = load_quietly(configure(folder, load_model_path=checkpoint, **WINDOW))
    assert loaded.has_markers and loaded.source.metadata is None
    assert_same_weights(loaded.model, backbone.model)


# Sources


def test_weights_are_float32_whatever_the_folder_holds(configure, tiny_folder):
    backbone = load_quietly(configure(tiny_folder(dtype=torch.bfloat16)))
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}


def test_weights_outlive_a_change_of_their_file(configure, tiny_folder):
    folder = tiny_folder()
    expected = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model = load_quietly(configure(folder, cot=True)).model
    expected.load_state_dict(model.state_dict())
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    assert_same_weights(model, expected)


def test_generation_config_of_the_folder_is_ignored(configure, tiny_folder):
    folder = tiny_folder()
    own = {"do_sample": True, "temperature": 0.1, "max_length": 3, "eos_token_id": 5}
    (folder / "generation_config.json").write_text(json.dumps(own))
    generation_config = load_quietly(configure(folder)).model.generation_config
    assert not generation_config.do_sample and generation_config.max_length != 3
    assert (generation_config.eos_token_id, generation_config.pad_token_id) == (0, 0)


def test_attention_implementation_is_the_configured_one(configure, tiny_folder):
    model = load_quietly(configure(tiny_folder(), attn_implementation="eager")).model
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="model_id: .* cannot be loaded: .*nonsense"):
        load_quietly(configure(tiny_folder(), attn_implementation="nonsense"))


def test_from_scratch_needs_no_weights_and_follows_the_seed(configure, tiny_folder):
    folder = tiny_folder()
    (folder / "model.safetensors").unlink()
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(load_quietly(configure(folder, from_scratch=True)).model)
    assert_same_weights(models[0], models[1])
    weights = [model.get_input_embeddings().weight for model in models]
    assert not torch.equal(weights[0], weights[2]) and len(weights[0]) == 40


def test_folder_without_weights_is_refused(configure, trained):
    _, folder, checkpoint = trained()
    for place in (folder, checkpoint):
        (place / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model_id: .* has no weights; set from_scratch: true"):
        load_quietly(configure(folder))
    with pytest.raises(UserError, match="load_model_path: .* has no weights; name a folder"):
        load_quietly(configure(folder, load_model_path=checkpoint))


def test_folder_without_a_model_is_refused(configure, tiny_folder):
    folder = tiny_folder()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"model_id: .* has no config\.json"):
        load_quietly(configure(folder))


def test_path_that_does_not_exist_is_refused(configure, tiny_folder, tmp_path):
    config = configure(tiny_folder(), load_model_path=tmp_path / "nothing")
    with pytest.raises(UserError, match="load_model_path: .*nothing does not exist"):
        load_quietly(config)


def test_a_model_that_is_not_a_causal_lm_is_refused(configure, tiny_folder):
    folder = tiny_folder()
    CLIPVisionConfig().save_pretrained(folder)
    with pytest.raises(UserError, match="is not a causal language model"):
        load_quietly(configure(folder))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("suffix", ["", ".pt", ".safetensors"])
def test_single_file_gives_the_weights_of_the_directory(
    configure, tiny_folder, tmp_path, family, suffix
):
    folder = tiny_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        shutil.copy(folder / "model.safetensors", file)
    else:
        torch.save(model.state_dict(), file)
    loaded = load_quietly(configure(folder, cot=True, load_model_path=file))
    assert not loaded.has_markers and loaded.source.metadata is None
    assert_same_weights(loaded.model, model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_published_coconut_file_gives_the_logits_of_the_checkpoint(
    configure, trained, tmp_path, family
):
    backbone, folder, checkpoint = trained(family, **WINDOW)
    torch.save(published_state(backbone.model), tmp_path / "checkpoint_40")
    input_ids = torch.tensor([[3, 37, 39, 39, 38, 4]])
    logits = []
    for path in (checkpoint, tmp_path / "checkpoint_40"):
        config = configure(folder, load_model_path=path, only_eval=True, resume=0, **WINDOW)
        loaded = load_quietly(config)
        assert loaded.has_markers
        coconut = build_coconut(config, loaded).eval()
        with torch.no_grad():
            logits.append(coconut(input_ids, torch.ones_like(input_ids)).logits)
    assert torch.equal(*logits)


def test_published_file_of_a_shrunk_padded_vocabulary_loads(configure, tiny_folder, tmp_path):
    folder = tiny_folder("llama", vocab_size=64)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(40, mean_resizing=False)
    torch.save(published_state(model), tmp_path / "weights")
    loaded = load_quietly(configure(folder, load_model_path=tmp_path / "weights", **WINDOW))
    assert loaded.has_markers
    assert_same_weights(loaded.model, model)


def test_published_file_of_a_model_that_never_grew_gets_markers(configure, tiny_folder, tmp_path):
    folder = tiny_folder()
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(published_state(model), tmp_path / "weights")
    loaded = load_quietly(configure(folder, load_model_path=tmp_path / "weights"))
    assert not loaded.has_markers and loaded.model.config.vocab_size == 40


@pytest.mark.parametrize("vocab_size", [40, 64])
def test_the_wrapper_tells_whether_a_vocabulary_that_need_not_grow_has_markers(
    configure, tiny_folder, tmp_path, vocab_size
):
    folder = tiny_folder("llama", vocab_size=vocab_size)
    model = AutoModelForCausalLM.from_pretrained(folder)
    bare, wrapped = tmp_path / "bare", tmp_path / "wrapped"
    torch.save(model.state_dict(), bare)
    torch.save(published_state(model), wrapped)
    assert_same_weights(
        load_quietly(configure(folder, cot=True, load_model_path=bare)).model, model
    )
    assert not load_quietly(configure(folder, load_model_path=bare)).has_markers
    loaded = load_quietly(configure(folder, load_model_path=wrapped, **WINDOW))
    assert loaded.has_markers
    assert_same_weights(loaded.model, model)
    with pytest.raises(UserError, match="holds Coconut weights .*, but this run is cot"):
        load_quietly(configure(folder, cot=True, load_model_path=wrapped))


def test_markers_in_the_tokenizer_of_model_id_say_nothing_about_other_weights(
    configure, tiny_folder, tmp_path, word_tokenizer
):
    folder, weights = tiny_folder("llama", vocab_size=64), tmp_path / "weights"
    shutil.copytree(folder, weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (weights / name).unlink()
    word_tokenizer.add_tokens(list(MARKERS))
    word_tokenizer.save_pretrained(folder)
    assert not load_quietly(configure(folder, load_model_path=weights)).has_markers


def test_buffers_that_the_model_class_ignores_are_not_surplus(configure, tiny_folder, tmp_path):
    folder = tiny_folder()
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    torch.save(state, tmp_path / "weights")
    load_quietly(configure(folder, cot=True, load_model_path=tmp_path / "weights"))


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.",
        "base_causallm.module.", "module.base_causallm._orig_mod.", "_fsdp_wrapped_module.",
    ],
)  # fmt: skip
def test_the_names_that_wrappers_give_to_tensors_load(configure, tiny_folder, tmp_path, prefix):
    folder = tiny_folder()
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    # What torch.compile does to a part of a model.
    state = {name.replace("h.0.", "h.0._orig_mod."): tensor for name, tensor in state.items()}
    path = tmp_path / "weights"
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, path)
    assert_same_weights(
        load_quietly(configure(folder, cot=True, load_model_path=path)).model, model
    )


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_prefix_that_is_the_only_difference_is_named(configure, tiny_folder, tmp_path, layout):
    folder = tiny_folder()
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    renamed = {f"net.inner.{name}": tensor.clone() for name, tensor in state.items()}
    path = tmp_path / "other"
    if layout == "folder":
        shutil.copytree(folder, path)
        save_file(renamed, path / "model.safetensors")
    else:
        torch.save(renamed, path)
    with pytest.raises(UserError, match=r"missing ones with the prefix net\.inner\.: save"):
        load_quietly(configure(folder, cot=True, load_model_path=path))


def break_state(state, fault):
    """`state` of a tiny GPT-2 with one fault, and the words that must name it."""
    if fault == "missing":
        del state["transformer.ln_f.weight"]
        return r"1 missing \(transformer\.ln_f\.weight\)"
    if fault == "surplus":
        state |= {f"extra_{i}": torch.ones(2) for i in range(6)}
        return r"6 surplus \(extra_0, extra_1, extra_2, extra_3 and 2 more\)"
    if fault == "shape":
        state["transformer.ln_f.weight"] = torch.ones(7)
        return r"1 of a wrong shape \(transformer\.ln_f\.weight \[7\], wanted \[32\]\)"
    if fault == "rows":
        state["transformer.wte.weight"] = torch.ones(39, 32)
        return r"wrong shape \(transformer\.wte\.weight \[39, 32\], wanted \[37, 32\]\)"
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    return r"1 surplus \(lm_head\.weight, unlike the input embedding"


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "rows", "head"])
@pytest.mark.parametrize("layout", ["bare", "folder", "wrapped"])
def test_tensors_that_do_not_fit_are_named(configure, tiny_folder, tmp_path, fault, layout):
    folder = tiny_folder()
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    wanted = break_state(state, fault)
    if layout == "folder":
        path = tmp_path / "other"
        shutil.copytree(folder, path)
        save_file(
            {name: tensor.clone() for name, tensor in state.items()}, path / "model.safetensors"
        )
    else:
        path = tmp_path / "weights"
        prefix = "base_causallm." * (layout == "wrapped")
        torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, path)
    config = configure(folder, cot=True, load_model_path=path)
    wanted = wanted.replace("extra", "(base_causallm.)?extra")
    with pytest.raises(UserError, match=f"load_model_path.* does not fit its model.*{wanted}"):
        load_quietly(config)


def test_a_copy_of_the_embedding_that_differs_and_unknown_tensors_are_surplus(
    configure, tiny_folder, tmp_path
):
    folder = tiny_folder()
    state = published_state(AutoModelForCausalLM.from_pretrained(folder))
    path = tmp_path / "weights"
    for changes in ({"embedding.weight": torch.ones(37, 32)}, {"stray": torch.ones(1)}):
        torch.save(state | changes, path)
        with pytest.raises(UserError, match=rf"1 surplus \({next(iter(changes))}\)"):
            load_quietly(configure(folder, cot=True, load_model_path=path))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_file_of_a_folder_is_named(configure, tiny_folder, name):
    folder = tiny_folder()
    os.truncate(folder / name, (folder / name).stat().st_size - 100)
    with pytest.raises(UserError, match=f"{name}: truncated or corrupt"):
        load_quietly(configure(folder))


def test_a_checkpoint_brings_its_own_architecture_and_tokenizer(configure, tiny_folder, trained):
    backbone, _, checkpoint = trained("gpt2")
    other = tiny_folder("llama")
    for model_id in (other, "no/such-model"):
        loaded = load_quietly(configure(model_id, load_model_path=checkpoint))
        assert_same_weights(loaded.model, backbone.model)
        assert len(loaded.tokenizer) == 40


# Methods


def test_coconut_weights_in_another_run_are_refused(configure, trained, tmp_path):
    backbone, folder, checkpoint = trained()
    file = tmp_path / "weights"
    torch.save(published_state(backbone.model), file)
    unlabelled = tmp_path / "unlabelled"
    shutil.copytree(checkpoint, unlabelled)
    (unlabelled / "coconut.json").unlink()
    for path, what in (
        (checkpoint, "was trained as coconut"),
        (file, "holds Coconut weights"),
        (checkpoint / "model.safetensors", "holds Coconut weights"),
        (unlabelled, "holds Coconut weights"),
    ):
        with pytest.raises(UserError, match=f"{what}.*, but this run is cot"):
            load_quietly(configure(folder, cot=True, load_model_path=path))


def test_evaluation_under_another_method_is_refused(configure, trained):
    _, folder, checkpoint = trained(cot=True)
    with pytest.raises(UserError, match="was trained as cot, but this run is coconut"):
        load_quietly(configure(folder, load_model_path=checkpoint, only_eval=True))


def test_the_log_says_when_evaluated_weights_never_saw_the_markers(configure, tiny_folder, caplog):
    folder = tiny_folder()
    caplog.set_level("INFO", "coconut")
    config = configure(folder, load_model_path=folder, only_eval=True)
    load_backbone(config)
    assert [text for text in caplog.messages if "never saw the latent markers" in text]
    assert len(caplog.messages) == 1


def test_coconut_weights_that_record_no_window_need_it_written_out(configure, trained, tmp_path):
    backbone, folder, _ = trained()
    torch.save(published_state(backbone.model), tmp_path / "weights")
    keys = {"load_model_path": tmp_path / "weights", "latent_window_size": 1}
    with pytest.raises(UserError, match="no coconut.json; write latent_weights, window_scope out"):
        load_quietly(configure(folder, **keys))
    assert load_quietly(configure(folder, **keys | WINDOW)).has_markers


def test_coconut_checkpoint_without_marker_rows_is_refused(configure, trained):
    _, folder, checkpoint = trained()
    shutil.copy(folder / "model.safetensors", checkpoint)
    shutil.copy(folder / "config.json", checkpoint)
    with pytest.raises(UserError, match="the embedding has no rows for the latent markers"):
        load_quietly(configure(folder, load_model_path=checkpoint))


def test_token_ids_unlike_the_tokenizers_are_refused(configure, trained):
    _, folder, checkpoint = trained()
    file = checkpoint / "coconut.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_token_id": 12}))
    config = configure(folder, load_model_path=checkpoint)
    loaded = load_quietly(config)
    with pytest.raises(UserError, match=r"coconut\.json has latent_token_id 12, the tokenizer 39"):
        build_coconut(config, loaded)


# Checkpoints without their run, and parameters outside the base model


class Gated(Coconut):
    """A subclass with a parameter of its own."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate = torch.nn.Parameter(torch.ones(2))


def save_coconut(folder, config, coconut, source):
    """A checkpoint directory of ours with the parameters outside the base model."""
    coconut.base_causallm.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    metadata = Metadata.of(config, source.tokenizer, type(coconut)).at(1, 0)
    (folder / "coconut.json").write_text(metadata.model_dump_json())
    extra = {name: p.detach().clone() for name, p in coconut.extra_parameters().items()}
    if extra:
        save_file(extra, folder / "coconut.safetensors")
    return folder


@pytest.fixture
def gated(configure, tiny_folder, tmp_path):
    """(configuration, Gated with trained values, its checkpoint)."""
    config = configure(tiny_folder(), latent_window_size=2, latent_weights=[0.7, 0.3])
    source = ModelSource.of(config)
    coconut = build_coconut(config, load_backbone(config), Gated)
    with torch.no_grad():
        coconut.gate.copy_(torch.tensor([3.0, 4.0]))
    return config, coconut, save_coconut(tmp_path / "checkpoint_2", config, coconut, source)


@torch.no_grad()
def logits_of(coconut):
    input_ids = torch.tensor([[3, 37, 39, 39, 38, 4]])
    return coconut.eval()(input_ids, torch.ones_like(input_ids)).logits


def test_a_checkpoint_loads_without_its_run(configure, trained):
    keys = {"latent_window_size": 2, "latent_weights": [0.7, 0.3], "window_scope": "pass"}
    backbone, folder, checkpoint = trained(**keys)
    coconut, tokenizer, metadata = load_coconut(checkpoint)
    assert not coconut.training and len(tokenizer) == 40
    assert (metadata.method, metadata.stage, metadata.latent_weights) == ("coconut", 1, [0.7, 0.3])
    assert torch.equal(
        logits_of(coconut), logits_of(build_coconut(configure(folder, **keys), backbone))
    )


def test_only_checkpoints_of_ours_load_without_a_run(tiny_folder, tmp_path):
    for folder in (tiny_folder(), tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"has no coconut\.json; name a checkpoint_N folder"):
            load_coconut(folder)


def test_the_parameters_of_a_subclass_come_back(gated, configure):
    config, coconut, checkpoint = gated
    loaded, _, metadata = load_coconut(str(checkpoint), Gated)
    assert type(loaded) is Gated and metadata.coconut_class == "test_model:Gated"
    assert loaded.gate.tolist() == [3, 4]
    for keys in ({"only_eval": True}, {"resume": 1}, {}):
        again = configure(config.model_id, load_model_path=checkpoint, **keys)
        assert build_coconut(again, load_quietly(again), Gated).gate.tolist() == [3, 4]
        with pytest.raises(UserError, match="was trained with coconut_class test_model:Gated"):
            build_coconut(again, load_quietly(again))


def test_a_class_is_never_imported_because_a_checkpoint_names_it(gated, tmp_path, monkeypatch):
    _, _, checkpoint = gated
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    file = checkpoint / "coconut.json"
    file.write_text(file.read_text().replace("test_model:Gated", "trap:Gated"))
    for coconut_class in (None, Gated):
        with pytest.raises(
            UserError, match="write coconut_class: trap:Gated or, from Python, pass"
        ):
            load_coconut(checkpoint, coconut_class)


def test_learned_weights_come_back(configure, tiny_folder, tmp_path):
    config = configure(tiny_folder()).model_copy(update={"latent_weights": "learned"})
    coconut = build_coconut(config, load_backbone(config))
    with torch.no_grad():
        coconut.window_logits.copy_(torch.tensor([3.0, 2.0, 1.0]))
    checkpoint = save_coconut(tmp_path / "checkpoint_2", config, coconut, ModelSource.of(config))
    loaded, _, metadata = load_coconut(checkpoint)
    assert metadata.latent_weights == "learned"
    assert loaded.window_logits.tolist() == [3, 2, 1]
    assert torch.equal(logits_of(loaded), logits_of(coconut))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"gate": None}, "gate is missing"),
        ({"other": torch.ones(1)}, "other is surplus"),
        ({"gate": torch.ones(3)}, r"gate has shape \[3\], wanted \[2\]"),
    ],
)
def test_tensors_outside_the_base_model_that_do_not_fit_are_named(gated, change, words):
    _, _, checkpoint = gated
    file = checkpoint / "coconut.safetensors"
    tensors = load_file(file) | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(UserError, match=rf"coconut\.safetensors does not fit the model: {words}"):
        load_coconut(checkpoint, Gated)


def test_new_parameters_may_start_from_a_checkpoint_without_them(gated, configure, trained):
    config, _, _ = gated
    _, _, plain = trained()
    fresh = configure(config.model_id, load_model_path=plain)
    assert build_coconut(fresh, load_quietly(fresh), Gated).gate.tolist() == [1, 1]
    for load in (
        lambda: load_coconut(plain, Gated),
        lambda: build_coconut(
            config := configure(fresh.model_id, load_model_path=plain, only_eval=True),
            load_quietly(config), Gated,
        ),
    ):  # fmt: skip
        with pytest.raises(UserError, match="does not fit the model: gate is missing"):
            load()


# Models


def change_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"n_layer": 10**9}, r"describes 1000000000 layers; restore config\.json"),
        (
            {"n_embd": 2**16},
            r"bytes of weights cannot hold the [\d,]+ parameters that config\.json",
        ),
        ({"n_head": 3}, r"cannot be loaded: .*`embed_dim`: 32 and `num_heads`: 3"),
    ],
)
def test_an_impossible_architecture_is_refused_before_it_is_built(
    configure, tiny_folder, changes, words
):
    folder = tiny_folder()
    change_config(folder, **changes)
    for read in (lambda config: model_outline(config, ModelSource.of(config)), load_quietly):
        with pytest.raises(UserError, match=f"model_id: .*{words}"):
            read(configure(folder))


def test_a_random_model_may_be_larger_than_the_weights_beside_it(configure, tiny_folder):
    folder = tiny_folder()
    change_config(folder, n_inner=100_000)
    assert load_quietly(configure(folder, from_scratch=True)).model.num_parameters() > 10**6


@pytest.mark.parametrize("name", ["x" * 5000, "x/" * 3000])
def test_a_path_longer_than_the_system_allows_is_refused(configure, tiny_folder, name):
    with pytest.raises(UserError, match="load_model_path: x.* does not exist; name a checkpoint"):
        load_quietly(configure(tiny_folder(), load_model_path=name))
    with pytest.raises(UserError, match="model_id: 'x.* is not a local folder"):
        load_quietly(configure(name))


def test_outline_is_the_size_of_the_loaded_model(configure, tiny_folder, tmp_path):
    folder = tiny_folder()
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), tmp_path / "weights")
    for keys in ({}, {"cot": True}, {"cot": True, "load_model_path": tmp_path / "weights"}):
        config = configure(folder, **keys)
        backbone = load_quietly(config)
        outline = model_outline(config, backbone.source)
        assert outline.num_parameters == backbone.model.num_parameters()
        assert outline.max_positions == 64
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        model_outline(configure(folder), ModelSource.of(configure(folder)))


@pytest.mark.parametrize(
    "other, limit",
    [
        (MptConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=8, vocab_size=40), 8),
        (MptConfig(d_model=32, n_heads=2, n_layers=1, max_seq_len=90, vocab_size=40), 90),
        (BloomConfig(hidden_size=32, n_head=2, n_layer=1, vocab_size=40), None),
        (
            # A factor for each of the pairs of a head of 16.
            {"long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "rope_type": "longrope"},
            8,
        ),
    ],
)
def test_a_limit_of_positions_is_known_by_any_of_its_names(configure, tiny_folder, other, limit):
    folder = tiny_folder()
    if isinstance(other, dict):
        rotary = other | {"rope_theta": 10000.0}
        positions = {"max_position_embeddings": 192, "original_max_position_embeddings": 8}
        other = Phi3Config(**SMALL, **positions, rope_parameters=rotary)
    other.save_pretrained(folder)
    config = configure(folder, from_scratch=True)
    assert model_outline(config, ModelSource.of(config)).max_positions == limit


def test_coconut_takes_window_and_ids_from_configuration_and_tokenizer(configure, tiny_folder):
    config = configure(
        tiny_folder(), latent_window_size=2, latent_weights=[0.7, 0.2, 0.1],
        window_scope="pass", thought="pause",
    )  # fmt: skip
    coconut = build_coconut(config, load_quietly(config))
    ids = (coconut.start_latent_id, coconut.end_latent_id, coconut.latent_token_id)
    assert (*ids, coconut.eos_token_id) == (37, 38, 39, 0)
    torch.testing.assert_close(coconut.latent_weights, torch.tensor([0.7, 0.2]))
    assert (coconut.window_scope, coconut.thought_kind) == ("pass", "pause")


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checking_a_model_leaves_its_mode_and_the_generator_alone(configure, tiny_folder, family):
    config = configure(tiny_folder(family, dropout=0.1))
    backbone = load_quietly(config)
    backbone.model.train()
    state = torch.get_rng_state()
    build_coconut(config, backbone)
    assert backbone.model.training and torch.equal(torch.get_rng_state(), state)


def save_other_model(folder, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


SMALL = {
    "vocab_size": MODEL_TOKENS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def test_a_model_that_coconut_cannot_read_is_refused_before_its_weights_are_read(
    configure, tiny_folder
):
    folder = tiny_folder()
    save_other_model(folder, GraniteConfig(**SMALL, logits_scaling=8.0))
    (folder / "model.safetensors").write_bytes(b"never read")
    config = configure(folder)
    words = "model_id .*: granite with logits_scaling 8.0 does not score a hidden state"
    for read in (lambda config: model_outline(config, ModelSource.of(config)), load_quietly):
        with pytest.raises(UserError, match=words):
            read(config)


def test_large_weights_do_not_change_what_kind_of_model_it_is(configure, tiny_folder):
    # Logits in the hundreds round by more than a padded and a bare row of small ones differ.
    folder = tiny_folder("llama")
    file = folder / "model.safetensors"
    save_file({name: 40 * tensor for name, tensor in load_file(file).items()}, file)
    config = configure(folder)
    build_coconut(config, load_quietly(config))


def test_what_no_text_reaches_is_frozen_in_training_and_the_log_says_so(
    configure, tiny_folder, caplog
):
    caplog.set_level("INFO", "coconut")
    folder = tiny_folder()
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "patch_size": 14,
        "num_attention_heads": 2, "image_size": 28,
    }  # fmt: skip
    other = Gemma3Config(
        text_config=SMALL, vision_config=vision, mm_tokens_per_image=4, image_token_index=36,
        boi_token_index=35, eoi_token_index=34,
    )  # fmt: skip
    save_other_model(folder, other)
    model = load_backbone(configure(folder, new_token_init="=")).model
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert frozen == {"vision_tower", "multi_modal_projector"} and trained == {"language_model"}
    (line,) = caplog.messages
    assert line.startswith("model.vision_tower, model.multi_modal_projector: ")
    assert line.endswith(" parameters that no text reaches are frozen")


@pytest.mark.filterwarnings("error::FutureWarning")
def test_activation_checkpointing_is_switched_on_where_the_model_supports_it(
    configure, tiny_folder, monkeypatch
):
    folder = tiny_folder()
    for keys in ({"cot": True}, {"thought": "pause"}):
        model = load_quietly(configure(folder, activation_checkpointing=True, **keys)).model
        assert model.is_activation_checkpointing
    # As in transformers 5.17.
    enable = PreTrainedModel._activation_checkpointing_enable
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", enable)
    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable")
    older = load_quietly(configure(folder, activation_checkpointing=True, cot=True)).model
    assert older.transformer.gradient_checkpointing
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="activation_checkpointing: gpt2 does not support it"):
        load_quietly(configure(folder, activation_checkpointing=True, cot=True))


@pytest.mark.skipif(not GPT2_TOKENIZER.is_dir(), reason="needs ../shared/models/gpt2-tokenizer")
def test_real_gpt2_tokenizer_starts_markers_from_its_angle_brackets(configure, tmp_path):
    folder = tmp_path / "gpt2"
    shutil.copytree(GPT2_TOKENIZER, folder)
    GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=32).save_pretrained(folder)
    config = configure(folder, from_scratch=True)
    backbone = load_quietly(config)
    weight = backbone.model.get_input_embeddings().weight
    assert marker_ids(backbone) == [50257, 50258, 50259] and len(weight) == 50260
    assert torch.equal(weight[50257:], weight[16791].expand(3, -1))
    text = f"Is Tom a wumpus?\n{MARKERS[0]}{MARKERS[2]}{MARKERS[1]}### Tom"
    decoded = backbone.tokenizer.decode(backbone.tokenizer.encode(text), skip_special_tokens=True)
    assert decoded == "Is Tom a wumpus?\n### Tom"
    build_coconut(config, backbone)

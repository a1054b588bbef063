"""Every causal model can be a reward model, and a multimodal model's text model is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpc_rlhf.errors import INPUT_WRONG, HpcRlhfError
from hpc_rlhf.spec import model_files
from hpc_rlhf.train.models.export import export
from hpc_rlhf.train.models.language_model import RewardModel
from hpc_rlhf.train.models.loading import load_causal, load_reward
from tests.models.families import FAMILIES
from tests.train import tiny

# transformers has no class with a score head for them, or for the last two one of another form.
NO_CLASS = (
    "granite", "olmoe", "cohere", "lfm2", "apertus", "ernie4_5", "codegen", "xglm", "llama4_text", "mamba", "ctrl",
    "modernbert-decoder",
)  # fmt: skip
ROWS = [[5, 6, 7, tiny.EOS], [9], [8, 30, 31, 32, 33, 34, tiny.EOS]]
IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
IMAGES_AND_TEXT = ("gemma3", "gemma4", "llama4", "mistral3", "llava", "qwen3_5")


def scores(model: RewardModel, rows: list[list[int]] = ROWS) -> torch.Tensor:
    """Scores of sequences, one after the other."""
    return torch.stack([model(torch.tensor(row), (len(row),))[-1] for row in rows])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.tokenizer()


def causal(kind: str) -> Any:
    return tiny.causal(kind, **{key: value for key, value in FAMILIES[kind].fields.items() if key != "model_type"})


@pytest.fixture(params=IMAGES_AND_TEXT)
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A multimodal model and its folder."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**FAMILIES[request.param].fields)
    model = tiny._spread(AutoModelForImageTextToText.from_config(config))
    model.save_pretrained(tmp_path / "whole")
    return model, tmp_path / "whole"


@pytest.mark.parametrize("kind", NO_CLASS)
@torch.no_grad()
def test_a_language_model_without_a_class_for_scores_becomes_a_reward_model(
    kind: str, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModel

    base = causal(kind)
    base.save_pretrained(tmp_path / "causal")
    model = load_reward(str(tmp_path / "causal"), torch.float32, seed=3).eval()
    head = model.classifier.score.weight[0]
    for row, score in zip(ROWS, scores(model), strict=True):
        hidden = base(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(score, hidden[0, -1] @ head, atol=1e-5, rtol=1e-5)
    export(model.classifier, tokenizer, tmp_path / "reward", is_main=True)
    (name,) = json.loads((tmp_path / "reward/config.json").read_text())["architectures"]
    assert name.endswith("ForSequenceClassification")
    again = load_reward(str(tmp_path / "reward"), torch.float32, seed=None).eval()
    torch.testing.assert_close(scores(again), scores(model), atol=1e-6, rtol=1e-6)
    # As docs/run-directory.md has it for programs without hpc-rlhf.
    hidden = AutoModel.from_pretrained(tmp_path / "reward").eval()(input_ids=torch.tensor(ROWS[:1])).last_hidden_state
    torch.testing.assert_close(hidden[0, -1] @ head, scores(model)[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_text_model_of_a_model_of_images_and_text_is_loaded_and_exported(
    whole: tuple[Any, Path], tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, folder = whole
    text = load_causal(str(folder), torch.float32).eval()
    assert torch.equal(text(input_ids=IDS).logits, model(input_ids=IDS).logits)
    export(text, tokenizer, tmp_path / "text", is_main=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert back.config.model_type == model.config.text_config.model_type
    torch.testing.assert_close(back(input_ids=IDS).logits, text(input_ids=IDS).logits)
    assert not [name for name in load_file(tmp_path / "text/model.safetensors") if "vision" in name]

    # Their first names, which published weights still have.
    firsts = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."))
    rewrite(folder, lambda weights: [_rename(weights, *names) for names in firsts])
    assert torch.equal(load_causal(str(folder), torch.float32).eval()(input_ids=IDS).logits, text(input_ids=IDS).logits)

    reward = load_reward(str(folder), torch.float32, seed=3).eval()
    export(reward.classifier, tokenizer, tmp_path / "reward", is_main=True)
    again = load_reward(str(tmp_path / "reward"), torch.float32, seed=None).eval()
    torch.testing.assert_close(scores(again), scores(reward), atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_an_output_head_in_the_files_is_not_tied(tokenizer: Any, tmp_path: Path) -> None:
    """Published Mistral 3 models leave ``tie_word_embeddings`` out, which transformers takes as true."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.for_model(**FAMILIES["mistral3"].fields, tie_word_embeddings=False)
    model = tiny._spread(AutoModelForImageTextToText.from_config(config)).eval()
    model.save_pretrained(tmp_path / "whole")
    path = tmp_path / "whole/config.json"
    fields = json.loads(path.read_text())
    del fields["tie_word_embeddings"]
    fields["text_config"].pop("tie_word_embeddings", None)
    path.write_text(json.dumps(fields))
    text = load_causal(str(tmp_path / "whole"), torch.float32).eval()
    assert torch.equal(text(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert not text.config.tie_word_embeddings
    export(text, tokenizer, tmp_path / "text", is_main=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, text(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "opt"])
@pytest.mark.parametrize(
    ("method", "place"), [("gptq", ""), ("awq", ""), ("bitsandbytes", ""), ("fp8", "text_config"), ("mxfp4", "")]
)
def test_quantized_weights_are_refused_before_they_are_loaded(
    kind: str, method: str, place: str, tmp_path: Path
) -> None:
    fields = tiny.config(kind).to_dict()
    (fields.setdefault(place, {}) if place else fields)["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for load in (
        lambda: load_causal(str(tmp_path), torch.float32),
        lambda: load_reward(str(tmp_path), torch.float32, 1),
    ):
        with pytest.raises(HpcRlhfError, match=rf"quantized \({method}\)") as caught:
            load()
        assert caught.value.exit_code == INPUT_WRONG, "it is not tried again"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_a_finished_reward_model_keeps_its_head(kind: str, tmp_path: Path) -> None:
    finished = tiny.classifier(kind)
    finished.score.weight.fill_(0.123)
    finished.save_pretrained(tmp_path)
    for seed in (None, 5):
        loaded = load_reward(str(tmp_path), torch.float32, seed)
        assert torch.equal(loaded.classifier.score.weight, finished.score.weight)
    half = load_reward(str(tmp_path), torch.bfloat16, None)
    assert torch.equal(half.classifier.score.float_weight(), finished.score.weight), "it was stored in float32"


def rewrite(folder: Path, change: Any) -> None:
    """Change the weights of a folder, given as a dictionary."""
    path = folder / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(path).items()}  # the file is overwritten
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def _rename(weights: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in weights if name.startswith(old)]:
        weights[new + name.removeprefix(old)] = weights.pop(name)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("name", ["v_head.summary", "value_head", "regression_head", "my_reward_layer"])
@torch.no_grad()
def test_heads_of_other_programs_are_kept(kind: str, name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Also if the configuration calls the model a language model."""
    model, head = tiny.causal(kind), torch.linspace(-1, 1, 32).view(1, 32)
    model.save_pretrained(tmp_path / "other")
    rewrite(
        tmp_path / "other",
        lambda weights: weights.update({f"{name}.weight": head, f"{name}.bias": head[0, 20:21].clone()}),
    )
    reward = load_reward(str(tmp_path / "other"), torch.float32, None).eval()
    hidden = model(input_ids=torch.tensor([ROWS[0]]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(scores(reward)[0], hidden[0, -1] @ head[0] + head[0, 20], atol=1e-5, rtol=1e-5)
    export(reward.classifier, tokenizer, tmp_path / "ours", is_main=True)
    again = load_reward(str(tmp_path / "ours"), torch.float32, None).eval()
    torch.testing.assert_close(scores(again), scores(reward), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_heads_that_are_not_one_linear_layer_with_one_output_are_refused(
    kind: str, seed: int | None, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    def refused(name: str, message: str) -> None:
        with pytest.raises(HpcRlhfError, match=message) as caught:
            load_reward(str(tmp_path / name), torch.float32, seed)
        assert caught.value.exit_code == INPUT_WRONG

    for name, labels in (("two", 2), ("three", 3)):
        model = AutoModelForSequenceClassification.from_config(tiny.config(kind, num_labels=labels))
        model.save_pretrained(tmp_path / name)
        refused(name, f"it scores {labels} labels, one is needed")
    model.save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled/model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    refused("pickled", "it scores 3 labels")
    tiny.classifier(kind).save_pretrained(tmp_path / "deep")
    rewrite(
        tmp_path / "deep",
        lambda w: w.update({"score.0.weight": torch.ones(8, 32), "score.2.weight": w.pop("score.weight")}),
    )
    refused("deep", r"its score head is not one linear layer \(score.0.weight, score.2.weight\)")
    tiny.classifier(kind).save_pretrained(tmp_path / "none")
    rewrite(tmp_path / "none", lambda w: w.pop("score.weight"))
    refused("none", "its weights have no score head")
    tiny.causal(kind).save_pretrained(tmp_path / "biased")
    biased = {"v_head.weight": torch.ones(1, 32), "v_head.bias": torch.ones(1)}
    torch.save(load_file(tmp_path / "biased/model.safetensors") | biased, tmp_path / "biased/pytorch_model.bin")
    (tmp_path / "biased/model.safetensors").unlink()
    refused("biased", "its score head is not one linear layer without bias")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_weights_that_are_missing_are_not_made_up(kind: str, tmp_path: Path) -> None:
    untied = tiny.classifier(kind, tie_word_embeddings=False)
    untied.save_pretrained(tmp_path / "reward")
    with pytest.raises(HpcRlhfError, match=r"the model's files lack the weights lm_head.weight"):
        load_causal(str(tmp_path / "reward"), torch.float32)
    tiny.causal(kind).save_pretrained(tmp_path / "cut")
    gone = next(name for name in load_file(tmp_path / "cut/model.safetensors") if "0." in name)
    rewrite(tmp_path / "cut", lambda weights: weights.pop(gone))
    for load in (
        lambda: load_causal(str(tmp_path / "cut"), torch.float32),
        lambda: load_reward(str(tmp_path / "cut"), torch.float32, 1),
    ):
        with pytest.raises(HpcRlhfError, match="the model's files lack the weights"):
            load()


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    tiny.causal("llama", num_labels=1).save_pretrained(tmp_path)
    with pytest.raises(HpcRlhfError, match="it is no reward model: it has no score head"):
        load_reward(str(tmp_path), torch.float32, None)


def test_what_check_knows_of_architectures_is_what_transformers_has() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert model_files.causal_types() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


@pytest.mark.slow
def test_models_that_cannot_recompute_activations_are_known() -> None:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kinds: Any = AutoModelForCausalLM._model_mapping
    without = {
        kind for kind in model_files.causal_types() if not kinds[CONFIG_MAPPING[kind]].supports_gradient_checkpointing
    }
    assert without == model_files.NO_CHECKPOINTING

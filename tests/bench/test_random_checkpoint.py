"""Checkpoints with random weights: laid out as published, with values that a model can run on."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open

from bench.published import PUBLISHED
from bench.published_text import published_tokenizer
from bench.random_checkpoint import checkpoint_tensors, main, write_random_checkpoint

NAMES = list(PUBLISHED)
# Sizes small enough for a test; all else is as published.
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 4096,
}
SMALL_EXPERTS = {"head_dim": 32, "num_local_experts": 8}
FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_HARMONY = {"<|return|>": 200002, "<|end|>": 200007, "<|call|>": 200012, "<|endofprompt|>": 200018}
ADDED_TOKENS = {
    "qwen-2.5-7b": {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|file_sep|>": 151664},
    "deepseek-r1-distill-llama-8b": {
        "<｜begin▁of▁sentence｜>": 128000,  # noqa: RUF001 - DeepSeek's bars
        "<think>": 128013,
        "<|reserved_special_token_247|>": 128255,
    },
    "gpt-oss-20b": _HARMONY,
    "gpt-oss-120b": _HARMONY,
}


def small(name):
    fields = SMALL | (SMALL_EXPERTS if name.startswith("gpt-oss") else {})
    return PUBLISHED[name].with_config(**fields)


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory):
    """A checkpoint of several shards."""
    path = tmp_path_factory.mktemp("checkpoints") / name
    return write_random_checkpoint(path, small(name), shard_bytes=2**20)


@pytest.fixture(scope="module")
def tensors(folder):
    """All tensors by name, as stored, each with the name of its file."""
    return {
        name: (tensor, path.name)
        for path in folder.glob("*.safetensors")
        for name, tensor in _read(path).items()
    }


def _read(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def _expected(config):
    """Names and shapes of the model's parameters; experts as MXFP4 stores them."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {}
    for name, parameter in model.state_dict().items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            experts, inputs, outputs = parameter.shape
            shapes[f"{name}_blocks"] = (experts, outputs, inputs // 32, 16)
            shapes[f"{name}_scales"] = (experts, outputs, inputs // 32)
        else:
            shapes[name] = tuple(parameter.shape)
    return shapes


def test_names_and_shapes_match_transformers(folder, tensors):
    """The folder has the parameters of the transformers model for its config.json."""
    config = transformers.AutoConfig.from_pretrained(folder)

    assert _expected(config) == {name: tuple(t.shape) for name, (t, _) in tensors.items()}


def test_names_and_shapes_match_at_full_size(name, tmp_path):
    """The same holds for the published configuration, without writing its weights here."""
    config = PUBLISHED[name].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(tmp_path)

    assert _expected(read) == {t.name: t.shape for t in checkpoint_tensors(config)}


def test_the_index_finds_every_tensor(folder, tensors):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    size = sum(tensor.nbytes for tensor, _ in tensors.values())

    assert {name: file for name, (_, file) in tensors.items()} == index["weight_map"]
    assert size == index["metadata"]["total_size"]
    assert len(set(index["weight_map"].values())) > 1


def test_tensors_have_the_published_dtypes(tensors):
    """Experts are stored as bytes, everything else in bfloat16."""
    for name, (tensor, _) in tensors.items():
        packed = name.endswith(("_blocks", "_scales"))

        assert tensor.dtype == (torch.uint8 if packed else torch.bfloat16), name


def test_weights_have_realistic_magnitudes(tensors):
    """Norms are around one, all else around zero; matrices have full rank and no equal rows."""
    for name, (tensor, _) in tensors.items():
        if tensor.dtype == torch.uint8:
            continue
        numbers = tensor.float().numpy()
        mean = 1.0 if "norm" in name else 0.0
        assert np.isfinite(numbers).all(), name
        if tensor.ndim == 2 and name.endswith("weight"):
            deviation = 1.0 if "embed" in name else tensor.shape[1] ** -0.5
            assert abs(numbers.std() / deviation - 1) < 0.1, name
            assert len(numbers) == len(np.unique(numbers, axis=0)), name
            assert min(numbers.shape) == np.linalg.matrix_rank(numbers), name
        if not name.endswith("sinks"):
            assert abs(numbers.mean() - mean) < 0.1, name


def test_experts_are_scaled_to_their_number_of_inputs(name, folder):
    """Unpacked, experts' values are scaled to their number of inputs."""
    experts = [t for t in checkpoint_tensors(small(name).config) if t.kind == "scales"]
    assert bool(experts) == name.startswith("gpt-oss")
    for scales in experts:
        stored = dict(kv for path in folder.glob("*.safetensors") for kv in _read(path).items())
        blocks = stored[scales.name.replace("_scales", "_blocks")].numpy()
        values = FP4[np.stack([blocks & 15, blocks >> 4], -1)].reshape(*blocks.shape[:3], 32)
        values *= np.exp2(stored[scales.name].numpy() - 127.0)[..., None]

        assert 0.6 < values.std() * (blocks.shape[2] * 32) ** 0.5 < 1.6
        assert len(np.unique(stored[scales.name])) == 3


def test_logits_depend_on_the_prompt(folder, name):
    """Logits are near one and depend on the prompt."""
    quantization = {}
    if name.startswith("gpt-oss"):
        quantization["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, **quantization
    )
    with torch.no_grad():
        hidden = model(torch.arange(48).view(2, 24), output_hidden_states=True)
    logits = hidden.logits.float()

    assert 0.5 < logits.std() < 2
    assert 0.5 < (logits[0, -1] - logits[1, -1]).std()
    assert hidden.hidden_states[-2].float().abs().max() < 50


def test_seed_determines_the_weights(tmp_path):
    published = small("qwen-2.5-7b")
    folders = [
        write_random_checkpoint(tmp_path / str(index), published, seed)
        for index, seed in enumerate((1, 1, 2))
    ]
    first, same, other = ((f / "model-00001-of-00001.safetensors").read_bytes() for f in folders)

    assert first == same
    assert first != other


def test_added_tokens_have_their_published_ids(name):
    """And any text survives encoding and decoding."""
    tokenizer = published_tokenizer(PUBLISHED[name])
    text = "Zwölf Boxkämpfer jagen, 十二\n\n  12345"

    assert ADDED_TOKENS[name] == {t: tokenizer.token_to_id(t) for t in ADDED_TOKENS[name]}
    assert text == tokenizer.decode(tokenizer.encode(text).ids)


def test_per_layer_settings_are_cut_too(name):
    """Per-layer fields of config.json are cut to the number of layers."""
    config = PUBLISHED[name].with_config(num_hidden_layers=2).config

    assert len(config.get("layer_types", "12")) == 2
    assert config.get("max_window_layers", 2) == 2


def test_folder_is_created_atomically(tmp_path, monkeypatch):
    """A failed attempt leaves nothing behind and can be repeated."""
    published = small("qwen-2.5-7b")
    with monkeypatch.context() as patch:
        patch.setattr("bench.random_checkpoint._normal", None)
        with pytest.raises(TypeError):
            write_random_checkpoint(tmp_path / "model", published)

    assert list(tmp_path.iterdir()) == []
    assert write_random_checkpoint(tmp_path / "model", published).is_dir()


@pytest.mark.parametrize("layers", ["0", "29"])
def test_invalid_number_of_layers_is_refused(layers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["", "qwen-2.5-7b", str(tmp_path / "m"), "--layers", layers])
    with pytest.raises(SystemExit):
        main()

    assert "--layers: qwen-2.5-7b has 28; choose from 1 to 28" in capsys.readouterr().err


def test_command_keeps_an_existing_folder(tmp_path, monkeypatch, capsys):
    """With the requested number of layers; an existing folder is left as it is."""
    monkeypatch.setitem(PUBLISHED, "qwen-2.5-7b", small("qwen-2.5-7b"))
    folder = tmp_path / "qwen-2.5-7b"
    monkeypatch.setattr("sys.argv", ["", "qwen-2.5-7b", str(folder), "--layers", "1"])
    main()
    config = transformers.AutoConfig.from_pretrained(folder)
    with pytest.raises(SystemExit):
        main()

    assert config.num_hidden_layers == 1
    assert capsys.readouterr().err == f"{folder} already exists\n"

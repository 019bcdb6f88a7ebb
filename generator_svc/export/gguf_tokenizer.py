"""The tokenizer of a GGUF file, built from its header: tokens, and merges or scores.

The conversion of transformers is not used: it drops added tokens such as <think>, gives every
byte-level vocabulary GPT-2's pre-tokenizer, and takes minutes for the merges of a SentencePiece
vocabulary. Values missing from the header default to llama.cpp's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader, TokenType

from generator_svc.export.errors import ExportError

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # tokenizer.ggml.model

_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen")
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

_SPACE = "\u2581"
_SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}
# Control tokens that end a turn or a text, in addition to the header's single eos_token_id.
_END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")


class GgufTokenizer:
    """The tokenizer of the GGUF file `path`; raises ExportError if it is not supported."""

    def __init__(self, path: Path) -> None:
        self._path = path
        prefix = "tokenizer."
        self._header = {
            name.removeprefix(prefix).removeprefix("ggml."): field.contents()
            for name, field in GGUFReader(path).fields.items()
            if name.startswith(prefix)
        }
        self._kind = self._header.get("model")
        if self._kind not in (BYTE_LEVEL, SENTENCEPIECE):
            raise self._unreadable(f"its model is {self._kind!r}, not gpt2 or llama")
        self._tokens: list[str] = self._value("tokens")
        types = self._header.get("token_type") or [TokenType.NORMAL] * len(self._tokens)
        if len(types) != len(self._tokens):
            raise self._unreadable(
                f"it has {len(self._tokens)} tokens but {len(types)} token types"
            )
        try:
            self._types = [TokenType(kind) for kind in types]
        except ValueError as error:
            raise self._unreadable(str(error)) from error
        for role in ("bos", "eos", "unknown", "padding"):
            token_id = self._id(role)
            if token_id is not None and self._types[token_id] == TokenType.NORMAL:
                self._types[token_id] = TokenType.CONTROL

    @property
    def chat_template(self) -> str | None:
        return self._header.get("chat_template")

    @property
    def adds_bos(self) -> bool:
        """Whether BOS is added at the start of a single text."""
        default = self._kind == SENTENCEPIECE or self._header.get("pre") in _LLAMA3
        return self._id("bos") is not None and bool(self._header.get("add_bos_token", default))

    @property
    def end_token_ids(self) -> list[int]:
        """Ids of the tokens that end an answer; the header's eos_token_id comes first."""
        ids = [self._id(role) for role in ("eos", "eot", "eom")]
        ids += [
            token_id
            for token_id, token in enumerate(self._tokens)
            if token in _END_TOKENS and self._types[token_id] == TokenType.CONTROL
        ]
        return [token_id for token_id in dict.fromkeys(ids) if token_id is not None]

    @property
    def special_tokens(self) -> dict[str, str | None]:
        """The BOS, EOS, UNK and padding tokens, by their names in tokenizer_config.json."""
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {name: self._id(role) for name, role in names.items()}
        return {
            f"{name}_token": None if token_id is None else self._tokens[token_id]
            for name, token_id in ids.items()
        }

    def definition(self) -> dict[str, Any]:
        """The content of tokenizer.json."""
        parts = self._byte_level() if self._kind == BYTE_LEVEL else self._sentencepiece()
        added = [
            {
                "id": token_id,
                "content": self._tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != TokenType.USER_DEFINED,
            }
            for token_id, kind in enumerate(self._types)
            if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "post_processor": self._begin_with_bos() if self.adds_bos else None,
            **parts,
        }

    def _byte_level(self) -> dict[str, Any]:
        pre = self._header.get("pre", "default")
        model = {
            "type": "BPE",
            "vocab": self._vocabulary(),
            "merges": self._value("merges"),
            "ignore_merges": pre in _LLAMA3,
        }
        return {
            "normalizer": {"type": "NFC"} if pre in _QWEN2 else None,
            "pre_tokenizer": self._pre_tokenizer(pre),
            "decoder": _byte_level(use_regex=True),
            "model": model,
        }

    def _pre_tokenizer(self, pre: str) -> dict[str, Any]:
        if pre in ("default", "gpt-2"):
            return _byte_level(use_regex=True)
        if pre in _SINGLE_DIGITS:
            first: dict[str, Any] = {"type": "Digits", "individual_digits": True}
            return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex=True)]}
        if pre not in (*_LLAMA3, *_QWEN2):
            raise ExportError(
                f"{self._path.name}: unknown pre-tokenizer {pre!r}; export from the Hugging Face "
                "folder instead"
            )
        pattern = {"Regex": _LLAMA3_SPLIT if pre in _LLAMA3 else _QWEN2_SPLIT}
        first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [first, _byte_level(use_regex=False)]}

    def _sentencepiece(self) -> dict[str, Any]:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
        restore = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
        normalizers: list[dict[str, Any]] = [replace]
        decoders: list[dict[str, Any]] = [restore, {"type": "ByteFallback"}, {"type": "Fuse"}]
        if self._header.get("add_space_prefix", True):
            normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        model = {
            "type": "BPE",
            "vocab": self._vocabulary(),
            "merges": self._merges(),
            "unk_token": self.special_tokens["unk_token"],
            "fuse_unk": True,
            "byte_fallback": True,
        }
        return {
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }

    def _merges(self) -> list[tuple[str, str]]:
        """All pairs of pieces that form a piece, those with the best resulting score first."""
        pieces = zip(self._tokens, self._value("scores"), self._types, strict=True)
        scores = {piece: score for piece, score, kind in pieces if kind == TokenType.NORMAL}
        pairs = [
            (scores[piece], scores[piece[:cut]], scores[piece[cut:]], piece[:cut], piece[cut:])
            for piece in scores
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        ]
        pairs.sort(key=lambda pair: pair[:3], reverse=True)
        return [pair[3:] for pair in pairs]

    def _vocabulary(self) -> dict[str, int]:
        return {token: token_id for token_id, token in enumerate(self._tokens)}

    def _begin_with_bos(self) -> dict[str, Any]:
        bos_id = self._id("bos")
        assert bos_id is not None
        bos = self._tokens[bos_id]
        before = [
            [
                {"SpecialToken": {"id": bos, "type_id": kind}},
                {"Sequence": {"id": name, "type_id": kind}},
            ]
            for kind, name in enumerate("AB")
        ]
        return {
            "type": "TemplateProcessing",
            "single": before[0],
            "pair": before[0] + before[1],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        }

    def _id(self, role: str) -> int | None:
        default = _SENTENCEPIECE_IDS.get(role) if self._kind == SENTENCEPIECE else None
        token_id = self._header.get(f"{role}_token_id", default)
        is_token = isinstance(token_id, int) and 0 <= token_id < len(self._tokens)
        return token_id if is_token else None

    def _value(self, name: str) -> Any:
        if not self._header.get(name):
            raise self._unreadable(f"it has no tokenizer.ggml.{name}")
        return self._header[name]

    def _unreadable(self, reason: str) -> ExportError:
        return ExportError(f"{self._path}: unreadable tokenizer: {reason}")


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }

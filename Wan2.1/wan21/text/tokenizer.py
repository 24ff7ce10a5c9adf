"""Prompts to token ids: the tokenizer of `google/umt5-xxl`, or a byte-level one for models with random weights."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from wan21.errors import CheckpointError
from wan21.text.clean import clean

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "spiece.model"


class Tokenizer:
    """Cleans a prompt and gives its ids, the end token last, and never more than `max_tokens` of them.

    Ids are equal to those of a Hugging Face fast tokenizer called with truncation on the cleaned text, without its
    padding: the encoder needs none.

    Args:
        backend: a `tokenizers.Tokenizer` that nobody else uses; its padding and truncation are set here.
        max_tokens: the most ids of a prompt, the end token included.
        source: where the backend came from, for messages.

    Raises:
        CheckpointError: the backend knows no end token.
    """

    def __init__(self, backend: Any, *, max_tokens: int = 512, source: str = "the tokenizer") -> None:  # noqa: ANN401 - tokenizers has no types
        end = backend.token_to_id(END)
        if end is None:
            raise CheckpointError(f"{source} has no token {END}, which ends every prompt; use the folder of umt5-xxl")
        backend.no_padding()
        backend.no_truncation()
        # Some files leave the end token to the program that reads them.
        self._appended: list[int] = [] if backend.encode("").ids[-1:] == [end] else [end]
        backend.enable_truncation(max_tokens - len(self._appended))
        self._backend = backend
        self._max_tokens = max_tokens

    @classmethod
    def from_folder(cls, folder: Path, *, max_tokens: int = 512) -> "Tokenizer":
        """The tokenizer of a Hugging Face folder, from its tokenizer.json.

        Raises:
            CheckpointError: the folder or the file is missing, or the file cannot be read.
        """
        path = folder / TOKENIZER_FILE
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; it should be that of the tokenizer, with {TOKENIZER_FILE}"
            )
        if not path.is_file():
            message = f"{path} is missing; copy it from google/umt5-xxl at the Hugging Face hub"
            if (folder / SENTENCEPIECE_FILE).is_file():
                message += (
                    f". {SENTENCEPIECE_FILE} alone is not read; where transformers is installed, "
                    f'AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}") makes the missing file'
                )
            raise CheckpointError(message)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(f"{path} is not a tokenizer file ({error}); download it again") from error
        return cls(backend, max_tokens=max_tokens, source=str(path))

    @classmethod
    def built_in(cls, *, max_tokens: int = 512) -> "Tokenizer":
        """A tokenizer that needs no file: the UTF-8 bytes of the text.

        Ids: 0 padding, 1 end, 2 unknown, 3 to 258 the bytes in order.
        """
        names = [PAD, END, UNKNOWN, *(f"<0x{byte:02X}>" for byte in range(256))]
        backend = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                vocab={name: index for index, name in enumerate(names)},
                merges=[],
                unk_token=UNKNOWN,
                byte_fallback=True,
            )
        )
        backend.add_special_tokens([PAD, END, UNKNOWN])
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, names.index(END))]
        )
        backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
        return cls(backend, max_tokens=max_tokens)

    def __call__(self, text: str) -> list[int]:
        """Ids of the cleaned text: 1 to `max_tokens` of them, the last one the end token."""
        return [*self._backend.encode(clean(text)).ids, *self._appended]

    def save(self, folder: Path) -> None:
        """Writes a folder that `from_folder` reads, and transformers' AutoTokenizer too.

        The folder is made where it is missing; files of the same names are replaced.
        """
        folder.mkdir(parents=True, exist_ok=True)
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.no_truncation()  # callers ask for truncation, each to its own length
        roles = {"pad_token": PAD, "eos_token": END, "unk_token": UNKNOWN}
        special = {role: token for role, token in roles.items() if backend.token_to_id(token) is not None}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self._max_tokens, **special}
        backend.save(str(folder / TOKENIZER_FILE))
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

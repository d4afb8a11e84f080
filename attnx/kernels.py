"""Lets the top-level folder `kernels` be imported as `attnx.kernels`, installed or not.

The folder itself is no importable package: Hugging Face's `kernels` owns that name, and transformers looks for it.
"""

from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()][:1]

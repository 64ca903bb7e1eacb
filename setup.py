"""Packaging of mixtral-ms; docs/dependencies.md says why each dependency is there."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "mixtral_ms/__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

TOKENIZER_EXAMPLE = "mistral-common>=1.8"
TENSORBOARD = "tensorboardX>=2.6"
PARQUET = "pyarrow>=15,<22"  # newer ones refuse numpy below 2
FAST_TOKENIZER = "gigatoken>=0.10"
CHAT_TEMPLATES = "fschat==0.2.36"

setup(
    name="mixtral-ms",
    version=VERSION,
    description="Mixtral for MindSpore: train and evaluate a sparse mixture of experts from YAML",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["mixtral_ms", "mixtral_ms.*"]),
    package_data={
        "mixtral_ms.train.report": ["*.jinja"],
        "mixtral_ms.kernels.native": ["*.cpp", "*.hpp"],
        "mixtral_ms.infer.runners.cpp": ["*.cpp", "*.hpp"],
    },
    python_requires=">=3.10",
    install_requires=[
        "mindspore>=2.7.2,<2.11",
        "numpy>=1.23,<2",
        "safetensors>=0.4,<0.8",  # from 0.8 on, tensors that are not contiguous are saved wrongly
        "sentencepiece>=0.2",
        "kitoken>=0.11",
        "pyyaml>=6",
        "tqdm>=4.60",
        "jinja2>=3",
        "matplotlib>=3.7",
    ],
    extras_require={
        "example": [TOKENIZER_EXAMPLE],
        "fast": [FAST_TOKENIZER],
        "finetune": [CHAT_TEMPLATES],
        "tensorboard": [TENSORBOARD],
        "parquet": [PARQUET],
        # Each release asks for its own MindSpore: 1.8 for 2.7, 1.9 for 2.9.
        "mindformers": ["mindformers>=1.8,<1.10"],
        "dev": ["pre-commit>=4"],
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff==0.17.5",  # another version formats otherwise
            "mypy==2.4.1",  # another version finds other errors
            "torch==2.13.0",  # exact: what the tests compare with
            "transformers>=5.12,<6",
            "peft>=0.21",
            TOKENIZER_EXAMPLE,
            TENSORBOARD,
            PARQUET,
            FAST_TOKENIZER,
            CHAT_TEMPLATES,
            "sentencepiece>=0.2.3",  # the tests' oracle asks it for the place of each piece
        ],
    },
    entry_points={"console_scripts": ["mixtral-ms=mixtral_ms.__main__:main"]},
)

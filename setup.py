"""Defines the metadata of grao-fast, and installs `kernels/` as `grao_fast.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "grao_fast" / "__init__.py").read_text("utf-8"), re.MULTILINE
).group(1)

RULES = ["jsonschema>=4.18", "math-verify>=0.8"]  # of grao_fast.rewards

TEST = [
    *RULES,
    "gguf>=0.10",  # the tests marked `real` read SmolLM2 from a GGUF file
    "hypothesis>=6.100",
    "lightning-fabric>=2.6.6",  # of an example for other trainers
    "openai>=1.56",  # the client of a vLLM server
    "peft>=0.18",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.8",  # several processes, with pytest's -n
    "setuptools>=77.0.1",  # the packaging tests build wheels without the network
    "sybil>=9.0",  # finds the blocks of code in docs
    "zstandard>=0.23",  # reads .zst files of a dataset
]

setup(
    name="grao-fast",
    version=VERSION,
    description="Group Relative Alignment Optimization for language models, with one-pass kernels",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["grao_fast", "grao_fast.*"]),
        "grao_fast.kernels",
        *(f"grao_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"grao_fast": "grao_fast", "grao_fast.kernels": "kernels"},
    package_data={"grao_fast": ["py.typed", "reporting/page/*.jinja"]},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4",
        "jinja2>=3.1",  # chat templates
        "jsonargparse>=4.48",
        "markupsafe>=2.1.2",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "regex>=2024.4.16",  # patterns with a time limit
        "rich>=13",
        "safetensors>=0.4.3",
        "torch>=2.8",
        "transformers>=5",
        'triton>=3.4; sys_platform == "linux"',
    ],
    extras_require={
        # without quack-kernels, which needs a Hopper GPU
        "bench": ["cut-cross-entropy>=25.1", "liger-kernel>=0.8.5", "trl>=1.16"],
        # the site needs Python 3.11
        "docs": [
            'mkdocstrings-python>=2; python_version >= "3.11"',
            'zensical>=0.0.73; python_version >= "3.11"',
        ],
        "browser": ["playwright>=1.65"],  # the tests marked `browser`, with a Chromium of their own
        "flash": ["flash-attn>=2.6"],
        "hub": ["kernels>=0.17"],
        "judge": ["openai>=1.56"],
        "liger": ["liger-kernel>=0.8"],
        "rules": RULES,
        "peft": ["peft>=0.18"],
        "trackers": [
            "alembic>=1.14",  # MLflow's in SQLite, as is SQLAlchemy
            "mlflow-skinny>=3.17",
            "sqlalchemy>=2",
            "tensorboard>=2.21",
            "trackio>=0.43",
            "wandb>=0.31",
        ],
        "trl": ["trl>=1.16"],
        "verl": ["verl>=0.9"],
        "vllm": ["vllm>=0.22"],
        "vllm-server": ["openai>=1.56"],
        "test": TEST,
        "dev": [*TEST, "build>=1.2", "pre-commit>=4", "pyright>=1.1.400", "ruff>=0.12"],
    },
    entry_points={
        "console_scripts": ["grao-fast = grao_fast.cli.commands:main"],
        "verl.plugins": ["grao = grao_fast.integrations.verl"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

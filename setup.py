"""Packaging: the top-level folders are the sub-packages of one import name, `openmoe`.

`openmoe` itself is a namespace package (no file), so `from openmoe.model.router import TopKRouter`
resolves to `model/router.py` in an editable install, in a wheel and in a spawned worker alike.
"""

from setuptools import find_packages, setup

ROOMS = ["launcher", "plan", "model", "parallel", "data", "optim", "train", "checkpoint", "conf"]

setup(
    name="openmoe",
    version="0.1.0",
    description="Training system for OpenMoE-style mixture-of-experts language models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[f"openmoe.{name}" for name in find_packages(include=ROOMS + [f"{room}.*" for room in ROOMS])],
    package_dir={f"openmoe.{room}": room for room in ROOMS},
    package_data={"openmoe.conf": ["**/*.yaml"]},
    # Tested ranges; requirements.txt holds the exact versions that CI installs.
    install_requires=[
        "torch>=2.9,<2.14",
        "numpy>=2.0,<3",
        "hydra-core>=1.3.2,<1.4",
        "omegaconf>=2.3,<2.4",
        "pydantic>=2.10,<3",
        "sentencepiece>=0.2.3,<0.3",
        "protobuf>=5,<8",
        "datasets>=4,<6",
        "pyarrow>=21,<27",
        "msgspec>=0.20,<0.23",
        "xxhash>=3.5,<5",
        "safetensors>=0.5,<0.9",
        "wandb>=0.31,<0.32",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "gpu": ["torch>=2.11,<2.14"],
        "tpu": ["torch==2.9.1", "torch_xla[tpu]==2.9.0"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20", "ninja>=1.11,<2"],
        "eval": ["transformers>=5,<6", "lm_eval>=0.4.12,<0.5"],
        "dev": [
            "pytest>=9,<10",
            "pytest-timeout>=2.4,<3",
            "hypothesis>=6.150,<7",
            "ruff>=0.17,<0.18",
            "mypy>=2.4,<2.5",
            "import-linter>=2.16,<3",
        ],
    },
    entry_points={
        "console_scripts": [
            "openmoe-train=openmoe.launcher.train:main",
            "openmoe-account=openmoe.launcher.account:main",
            "openmoe-upcycle=openmoe.launcher.upcycle:main",
            "openmoe-export=openmoe.launcher.export:main",
            "openmoe-import-weights=openmoe.launcher.import_weights:main",
            "openmoe-generate=openmoe.launcher.generate:main",
            "openmoe-inspect-data=openmoe.launcher.inspect_data:main",
            "openmoe-plan=openmoe.launcher.plan:main",
            "openmoe-prepare=openmoe.launcher.prepare:main",
            "openmoe-report=openmoe.launcher.report:main",
            "openmoe-tokenizer=openmoe.launcher.tokenizer:main",
            "openmoe-tpu=openmoe.launcher.tpu:main",
            "openmoe-xla-spawn=openmoe.launcher.xla_spawn:main",
        ]
    },
)

"""What pyproject.toml cannot say: `configs/`, at the top where people look, is `finetune_bn/configs` in the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["finetune_bn*"]),
        *(f"finetune_bn.configs{part}" for part in ("", ".batch_norm", ".with")),
    ],
    package_dir={"finetune_bn.configs": "configs"},
    package_data={
        "finetune_bn": [
            "py.typed",
            "data/emoji64.zip",
            "data/emoji64_NOTICE.md",
            "diagnosis/measured.json",
            "diagnosis/page.css",
            "diagnosis/page.js",
        ],
        "": ["*.yaml"],
    },
)

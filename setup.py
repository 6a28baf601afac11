"""The package's metadata lives in settings.ini; this reads it."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
about = config["DEFAULT"]

setup(
    name=about["lib_name"],
    version=about["version"],
    description=about["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=about["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=about["keywords"].split(),
    packages=find_packages(include=["fasterai", "fasterai.*"]),
    python_requires=f">={about['min_python']}",
    install_requires=about["requirements"].split(),
    extras_require={"dev": about["dev_requirements"].split()},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: {v}" for v in about["python_versions"].split()),
    ],
)

"""Certificates for tests of TLS, made with openssl when they are needed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pe_infer.node.settings import Tls


class Authority:
    """An authority that signs certificates; its files are in a folder of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed")
        self.folder = folder / name
        self.folder.mkdir()
        self._run("req", "-x509", *self._new(f"/CN={name}", "ca"), "-out", "ca.pem")

    def tls(self, name: str, *, names: str = "IP:127.0.0.1") -> Tls:
        """Settings of a side that shows a certificate for ``names`` and trusts this authority."""
        self._run("req", *self._new(f"/CN={name}", name), "-out", f"{name}.csr")
        (self.folder / "ext").write_text(f"subjectAltName={names}\n")
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext"]
        self._run("x509", "-req", "-in", f"{name}.csr", *signing, "-out", f"{name}.pem")
        return Tls(
            certificate=self.folder / f"{name}.pem",
            key=self.folder / f"{name}.key",
            authority=self.folder / "ca.pem",
        )

    def _run(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments], cwd=self.folder, check=True, capture_output=True, timeout=60
        )

    @staticmethod
    def _new(subject: str, name: str) -> list[str]:
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
        return [*curve, "-nodes", "-keyout", f"{name}.key", "-subj", subject]

"""Mutual TLS: 1.2 or newer, both sides show a certificate that the authority vouches for."""

import ssl

from pe_infer.errors import Code, NodeError
from pe_infer.node.settings import Tls


def server_context(tls: Tls) -> ssl.SSLContext:
    """For a side that is connected to: peers without a certificate of the authority are refused.

    Raises:
        NodeError: ``node.network``: a file cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _loaded(context, tls)


def client_context(tls: Tls) -> ssl.SSLContext:
    """For a side that connects: the certificate has to be for the host that was connected to too.

    Raises:
        NodeError: ``node.network``: a file cannot be used.
    """
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), tls)


def _loaded(context: ssl.SSLContext, tls: Tls) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        # Without a password here, OpenSSL would ask for that of an encrypted key on the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (OSError, ValueError) as exc:
        raise NodeError(
            f"{tls.certificate}, {tls.key}: cannot be used: {exc}. Give a certificate and its "
            "private key, not encrypted, in PEM files.",
            code=Code.NODE_NETWORK,
        ) from exc
    try:
        context.load_verify_locations(tls.authority)
    except (OSError, ValueError) as exc:
        raise NodeError(
            f"{tls.authority}: cannot be used: {exc}. Give certificates in a PEM file.",
            code=Code.NODE_NETWORK,
        ) from exc
    return context

"""Masks that cancel in a sum, and the keys and shares that they are made of: the cryptography of secure sums.

Key agreement, secret sharing and encryption are Flower's. Its generator of masks takes a seed of 32 bits, which can be
tried out, so masks come from AES in counter mode under the whole key.
"""

from __future__ import annotations

import base64
import os
from typing import Any

import numpy as np

from fedlora.flower import agreed_key, combine_shares, create_shares, decrypt, encrypt

PUBLIC_KEY, SEED, SHARE, SEALED = 33, 32, 52, 248
"""Bytes of a public key, of a seed or a private key, of a share of these, and of two shares sealed for their holder."""


def key_pair() -> tuple[bytes, bytes]:
    """Draw a private key on the curve P-256, and return it with its public key."""
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1()).private_numbers().private_value.to_bytes(SEED, "big")
    return private, public_key(private)


def public_key(private: bytes) -> bytes:
    """Return the public key of a private one, as a compressed point."""
    from cryptography.hazmat.primitives import serialization

    form = serialization.PublicFormat.CompressedPoint
    key: bytes = _private(private).public_key().public_bytes(serialization.Encoding.X962, form)
    return key


def agree(private: bytes, public: bytes) -> bytes:
    """Return the key on which the owners of two pairs of keys agree; the other one has the same.

    Raises
    ------
    ValueError
        If the public key is no point of the curve.
    """
    return agreed_key(_private(private), read_public_key(public))


def read_public_key(public: bytes) -> Any:
    """Read a public key.

    Raises
    ------
    ValueError
        If it is no point of the curve.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public)


def _private(private: bytes) -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.derive_private_key(int.from_bytes(private, "big"), ec.SECP256R1())


def new_seed() -> bytes:
    """Draw a seed of a mask."""
    return os.urandom(SEED)


def mask(seed: bytes, count: int) -> np.ndarray:
    """Return the mask of a seed: residues modulo 2^32, which nobody without it can tell from uniform ones.

    A seed must be used for one mask only.

    Returns
    -------
    ndarray of uint32 [count]
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)), np.uint32)


def pair_mask(key: bytes, own: int, other: int, count: int) -> np.ndarray:
    """Return the mask that a client adds for another one, given the key on which they agree; the two cancel."""
    shared = mask(base64.urlsafe_b64decode(key), count)
    return shared if own > other else np.uint32(0) - shared


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """Divide a seed or a private key into shares."""
    return create_shares(secret, threshold, count)


def join(shares: list[bytes]) -> bytes:
    """Put a secret together from at least the threshold of its shares.

    Raises
    ------
    ValueError
        If they are no shares of one secret.
    """
    secret = combine_shares(shares)
    if len(secret) != SEED:
        raise ValueError("the shares are not of one secret")
    return secret


def seal(key: bytes, source: int, holder: int, seed: bytes, private: bytes) -> bytes:
    """Seal the shares of a client's seed and of its private key for one who holds them."""
    return encrypt(key, _head(source, holder) + seed + private)


def unseal(key: bytes, sealed: bytes, source: int, holder: int) -> tuple[bytes, bytes]:
    """Undo :func:`seal`.

    Raises
    ------
    ValueError
        If it was sealed by, or for, somebody else.
    """
    try:
        text = decrypt(key, sealed)
    except Exception:
        text = b""
    if not text.startswith(_head(source, holder)) or len(text) != 16 + 2 * SHARE:
        raise ValueError(f"the shares of client {source} are not sealed for client {holder}")
    return text[16 : 16 + SHARE], text[16 + SHARE :]


def _head(source: int, holder: int) -> bytes:
    return source.to_bytes(8, "little") + holder.to_bytes(8, "little")

"""Parity runners of KeyFace's whole stages: sampling with emotion, sampling with two networks, and the training loss with gradients."""

from __future__ import annotations


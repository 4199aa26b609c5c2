"""Figures of a comparison as pure functions of arrays: distances of sets, synchrony, pictures, landmarks, votes."""

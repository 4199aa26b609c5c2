"""Window plan, two-stage generation and a dubbing job."""

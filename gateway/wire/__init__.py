"""The contract between gateway and cloud, version 1: topics, messages, codecs, schemas.

Stdlib, numpy, msgspec, cbor2 and zstandard only. What decodes today decodes for ever: the golden vectors in
tests/gateway/wire/vectors are frozen, and a change that breaks one is a new version of the contract.
"""

"""The identity of a store that a benchmark makes up."""

from pipeline.store.format.schema import StoreIdentity


def identity(
    classes: int,
    *,
    encoding: str = "dense",
    k: int | None = None,
    size: int = 32,
    policy: str = "crop_flip",
) -> StoreIdentity:
    return StoreIdentity(
        dataset_fingerprint="0" * 64,
        teacher_fingerprint="0" * 64,
        policy=policy,
        seed=0,
        image_size=size,
        encoding=encoding,
        k=k,
        precision="float32",
        num_classes=classes,
    )

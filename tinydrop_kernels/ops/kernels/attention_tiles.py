"""Which tile attention's programs have, by how long the segments are."""

from typing import NamedTuple


class Tile(NamedTuple):
    """What one program holds, and how it is compiled."""

    BLOCK_QUERY: int
    BLOCK_KEY: int  # the whole segment is one block of keys where it fits
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None  # set where the assembler, left alone, takes fewer registers and spills


# Longest segment of keys: the tile, for (head_dim > 64?, bias?) in half precision and (head_dim > 64?) in float32. A
# tile of the segment's own size while its scores fit the registers, up to 128 keys; then a loop over blocks of keys,
# which also ends early for the short segments of a ragged batch. Chosen from what compiles without spills for sm_80,
# sm_90 and sm_100 (bench/results/static.md). On a GPU nothing has been measured yet; bench/tune_attention.py does.
LONG = 1 << 30
HEAVY = {  # a wide head or a bias takes more registers
    16: Tile(16, 16, 2),
    32: Tile(32, 32, 4),
    64: Tile(64, 64, 4),
    128: Tile(64, 128, 8),
    LONG: Tile(64, 32, 8),
}
HALF_TILES = {
    (False, False): {
        16: Tile(16, 16, 1),
        32: Tile(32, 32, 2),
        64: Tile(64, 64, 4),
        128: Tile(128, 128, 8),
        LONG: Tile(128, 64, 8, 3),
    },
    (False, True): {**HEAVY, LONG: Tile(64, 32, 8, maxnreg=255)},
    (True, False): HEAVY,
    (True, True): HEAVY,
}
FLOAT32_TILES = {
    False: {16: Tile(16, 16, 2), LONG: Tile(32, 32, 8, maxnreg=128)},
    True: {16: Tile(16, 16, 4), LONG: Tile(16, 32, 8, 1, maxnreg=128)},
}
LARGEST_BY_MEAN = 64  # larger tiles are for segments that all fill them


def tile_for(
    max_seqlen_q: int, max_seqlen_k: int, mean_seqlen_k: int, head_dim: int, is_float32: bool, has_bias: bool
) -> Tile:
    """The tile of such segments. Few queries, as a pool's latent ones are, share a tile of 16 rows.

    In a ragged batch most segments are shorter than the longest: they get a tile of their own size, in which the few
    long ones take several turns.
    """
    is_wide = head_dim > 64
    tiles = FLOAT32_TILES[is_wide] if is_float32 else HALF_TILES[is_wide, has_bias]
    longest = min(size for size in tiles if size >= max_seqlen_k)
    # A quarter more than the mean holds most of a batch; an eighth of the longest keeps its turns few.
    usual = min(size for size in tiles if size >= max(1.25 * mean_seqlen_k, max_seqlen_k / 8))
    by_mean = usual <= LARGEST_BY_MEAN and not (is_wide and has_bias)  # whose loop over 64 keys would spill
    tile = tiles[min(usual, longest) if by_mean else longest]
    if max_seqlen_q <= 16 < tile.BLOCK_QUERY:
        return Tile(16, 64, 8, maxnreg=128) if is_wide else Tile(16, min(tile.BLOCK_KEY, 64), 4)
    return tile

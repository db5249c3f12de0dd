"""The choice of the attention kernel's tile by the lengths of the segments."""

from typing import NamedTuple


class Tile(NamedTuple):
    """The tile of one program and its compiler options."""

    BLOCK_QUERY: int
    BLOCK_KEY: int  # holds all keys of the segment if they fit
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None  # set where the assembler would otherwise take fewer registers and spill


# Each table maps the longest segment of keys to a tile. The tables are keyed by (head_dim > 64?, bias?) in half
# precision and by (head_dim > 64?) in float32. Up to 128 keys the tile holds the whole segment, because its scores fit
# the registers. Beyond that the kernel loops over blocks of keys, and the loop ends early for short segments.
# All tiles compile without spills for sm_80, sm_90 and sm_100 (bench/results/static.md). None has been timed on a GPU
# yet; bench/tune_attention.py does that.
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
LARGEST_BY_MEAN = 64  # the mean length chooses no larger tile, because most segments would not fill it


def tile_for(
    max_seqlen_q: int, max_seqlen_k: int, mean_seqlen_k: int, head_dim: int, is_float32: bool, has_bias: bool
) -> Tile:
    """Return the tile for segments of these lengths.

    In a ragged batch most segments are shorter than the longest. The tile then fits the usual length, and the few long
    segments take several turns. At most 16 queries, such as a pool's latent queries, get a tile of 16 rows.
    """
    is_wide = head_dim > 64
    tiles = FLOAT32_TILES[is_wide] if is_float32 else HALF_TILES[is_wide, has_bias]
    longest = min(size for size in tiles if size >= max_seqlen_k)
    # A tile of 1.25 times the mean holds most segments. At least an eighth of the longest limits its number of turns.
    usual = min(size for size in tiles if size >= max(1.25 * mean_seqlen_k, max_seqlen_k / 8))
    by_mean = usual <= LARGEST_BY_MEAN and not (is_wide and has_bias)  # a loop over 64 keys would spill
    tile = tiles[min(usual, longest) if by_mean else longest]
    if max_seqlen_q <= 16 < tile.BLOCK_QUERY:
        return Tile(16, 64, 8, maxnreg=128) if is_wide else Tile(16, min(tile.BLOCK_KEY, 64), 4)
    return tile

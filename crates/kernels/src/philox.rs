//! Random words from a counter: Philox4x32-10, and the sketch entries made from it.
//!
//! A word depends on its key and counter only, so any part of a sketch can be made anywhere, in any order, with the
//! same bits. A sketch entry is the number of ones in a word less 16: an integer in [-16, 16], exact in every float
//! format, with mean 0 and variance 8.

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The four words of Philox4x32-10 (Salmon et al., 2011) at `counter` under `key`.
#[inline]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// The sketch entry at (`row`, `col`) for `seed` (one a run) and `key` (one a tensor).
#[inline]
pub fn sketch_entry(seed: u64, key: u64, row: u32, col: u32) -> f32 {
    let words = sketch_words(seed, key, row, col / 4);
    entry(words[(col % 4) as usize])
}

/// The words behind the entries `4 * block .. 4 * block + 4` of a row.
#[inline]
pub(crate) fn sketch_words(seed: u64, key: u64, row: u32, block: u32) -> [u32; 4] {
    philox4x32_10([block, row, key as u32, (key >> 32) as u32], [seed as u32, (seed >> 32) as u32])
}

#[inline]
pub(crate) fn entry(word: u32) -> f32 {
    word.count_ones() as f32 - 16.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_known_answers_of_random123() {
        let cases = [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, want) in cases {
            assert_eq!(philox4x32_10(counter, key), want);
        }
    }

    #[test]
    fn sketch_entries_have_mean_zero_and_variance_eight() {
        let n = 200_000u32;
        let (mut sum, mut sumsq) = (0.0f64, 0.0f64);
        for i in 0..n {
            let x = f64::from(sketch_entry(3, 5, i / 64, i % 64));
            assert!(x.fract() == 0.0 && x.abs() <= 16.0);
            sum += x;
            sumsq += x * x;
        }
        let n = f64::from(n);
        // Five standard errors: of the mean sqrt(8/n); of the variance sqrt((m4 - 64)/n) with m4 = 3*64 - 4 = 188.
        assert!((sum / n).abs() < 5.0 * (8.0 / n).sqrt(), "mean {}", sum / n);
        assert!((sumsq / n - 8.0).abs() < 5.0 * (124.0 / n).sqrt(), "variance {}", sumsq / n);
    }
}

//! Ranks for many modules under one limit of bytes.
//!
//! Every singular value is an offer: its square for the bytes of one more rank of its module. The best offers a byte are
//! taken first, each module's in its own order, until the next does not fit; smaller ones that still fit are taken after
//! it. Singular values never show more than there is, so the result never promises too much.
//!
//! Not here: finding the singular values.

use std::collections::BTreeMap;

/// What one module offers.
pub(crate) struct Offer<'a> {
    pub(crate) name: &'a str,
    pub(crate) bytes_per_rank: u64,
    /// Largest first.
    pub(crate) singular: &'a [f64],
}

/// The rank of each module; 0 for what gets none.
pub(crate) fn ranks<'a>(offers: &[Offer<'a>], bytes: u64) -> BTreeMap<&'a str, usize> {
    let mut ranks: BTreeMap<&str, usize> = offers.iter().map(|offer| (offer.name, 0)).collect();
    let mut all: Vec<(f64, &Offer<'a>, usize)> = offers
        .iter()
        .flat_map(|offer| {
            let worth = |value: f64| value * value / offer.bytes_per_rank.max(1) as f64;
            offer.singular.iter().enumerate().map(move |(k, &value)| (worth(value), offer, k))
        })
        .collect();
    // Equal offers in the order of names, so that the result depends on nothing else.
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (a.1.name, a.2).cmp(&(b.1.name, b.2))));
    let mut left = bytes;
    for (_, offer, k) in all {
        let Some(rank) = ranks.get_mut(offer.name) else { continue };
        if *rank == k && offer.bytes_per_rank <= left {
            *rank += 1;
            left -= offer.bytes_per_rank;
        }
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_take_the_best_offers_a_byte() {
        let offers = [
            Offer { name: "a", bytes_per_rank: 10, singular: &[3.0, 2.0, 0.5] },
            Offer { name: "b", bytes_per_rank: 40, singular: &[5.0, 1.0] },
            Offer { name: "c", bytes_per_rank: 10, singular: &[] },
        ];
        let of = |bytes| ranks(&offers, bytes).into_values().collect::<Vec<_>>();
        // A byte: a 0.9, 0.4, 0.025; b 0.625, 0.025.
        assert_eq!(of(0), [0, 0, 0]);
        assert_eq!(of(10), [1, 0, 0]);
        assert_eq!(of(20), [2, 0, 0]);
        assert_eq!(of(50), [1, 1, 0]);
        assert_eq!(of(60), [2, 1, 0]);
        assert_eq!(of(70), [3, 1, 0]);
        assert_eq!(of(1000), [3, 2, 0]);
    }
}

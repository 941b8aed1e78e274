//! Maglev hashing (Eisenbud et al., NSDI 2016): an even table of backends that changes little when one comes or goes.

/// Table sizes: primes. With a thousand entries for each backend, one leaving of 40 moves 3 % of the flows (a hundred move
/// 4.5 %, 2.5 % is the least possible).
const SIZES: [usize; 4] = [4099, 16_411, 65_537, 500_009];

/// A keyed 64-bit hash, the same in every worker and after every restart: flows survive both.
pub fn hash(bytes: &[u8], seed: u64) -> u64 {
    let mut state = seed ^ 0x243f_6a88_85a3_08d3;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        state = fold(state ^ u64::from_le_bytes(word), 0x9e37_79b9_7f4a_7c15);
    }
    fold(state ^ bytes.len() as u64, 0xbf58_476d_1ce4_e5b9)
}

fn fold(a: u64, b: u64) -> u64 {
    let wide = u128::from(a) * u128::from(b | 1);
    (wide >> 64) as u64 ^ wide as u64
}

/// A look-up table over backends numbered by their place in the list it was built from.
#[derive(Debug, Default, Clone)]
pub struct Maglev {
    table: Vec<u16>,
}

impl Maglev {
    /// `backends`: a stable identity and a weight each; weight 0 is left out. Empty when nothing is left.
    pub fn build(backends: &[(&str, u64)]) -> Maglev {
        let mut turns: Vec<(u16, usize, usize, u64)> = Vec::new();
        let heaviest = backends.iter().map(|(_, weight)| *weight).max().unwrap_or(0);
        if heaviest == 0 {
            return Maglev::default();
        }
        let size = SIZES.into_iter().find(|size| *size >= backends.len() * 1000).unwrap_or(SIZES[3]);
        for (number, (name, weight)) in backends.iter().enumerate().filter(|(_, (_, weight))| *weight > 0) {
            let offset = hash(name.as_bytes(), 1) as usize % size;
            let skip = hash(name.as_bytes(), 2) as usize % (size - 1) + 1;
            turns.push((number as u16, offset, skip, *weight));
        }
        // Filling in the order of names, not of the list, keeps the table independent of how the list was written.
        turns.sort_by_key(|(number, ..)| backends[usize::from(*number)].0);
        let mut table = vec![u16::MAX; size];
        let mut credit = vec![0u64; turns.len()];
        let mut filled = 0;
        'filling: loop {
            for (turn, credit) in turns.iter_mut().zip(&mut credit) {
                *credit += turn.3;
                if *credit < heaviest {
                    continue;
                }
                *credit -= heaviest;
                while table[turn.1] != u16::MAX {
                    turn.1 = (turn.1 + turn.2) % size;
                }
                table[turn.1] = turn.0;
                filled += 1;
                if filled == size {
                    break 'filling;
                }
            }
        }
        Maglev { table }
    }

    /// The place in the list of the backend for a hash; `None` when no backend takes flows.
    pub fn choose(&self, hash: u64) -> Option<usize> {
        if self.table.is_empty() {
            return None;
        }
        Some(usize::from(self.table[(hash % self.table.len() as u64) as usize]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|n| format!("backend-{n}")).collect()
    }

    fn shares(table: &Maglev, count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        for entry in &table.table {
            shares[usize::from(*entry)] += 1;
        }
        shares
    }

    #[test]
    fn forty_backends_share_evenly_and_one_leaving_moves_little() {
        let names = names(40);
        let all: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 256)).collect();
        let before = Maglev::build(&all);
        let shares = shares(&before, 40);
        let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        assert!(most - least <= 2, "{least}..{most}");
        let mut fewer = all.clone();
        fewer[17].1 = 0;
        let after = Maglev::build(&fewer);
        let moved = (0..100_000u64)
            .filter(|n| before.choose(hash(&n.to_le_bytes(), 0)) != after.choose(hash(&n.to_le_bytes(), 0)))
            .count();
        assert!(moved as f64 <= 100_000.0 * 1.5 / 40.0, "{moved} of 100000 flows moved");
    }

    #[test]
    fn weights_are_kept() {
        let table = Maglev::build(&[("a", 100), ("b", 300), ("c", 0)]);
        let shares = shares(&table, 3);
        let ratio = shares[1] as f64 / shares[0] as f64;
        assert!((2.9..3.1).contains(&ratio) && shares[2] == 0, "{shares:?}");
    }

    #[test]
    fn nothing_to_choose_from() {
        assert_eq!(Maglev::build(&[]).choose(5), None);
        assert_eq!(Maglev::build(&[("a", 0)]).choose(5), None);
        assert_eq!(Maglev::build(&[("a", 1)]).choose(5), Some(0));
    }

    proptest! {
        #[test]
        fn a_table_depends_on_names_and_weights_alone(count in 1usize..30, rotate in 0usize..30, weights in prop::collection::vec(1u64..400, 30)) {
            let names = names(count);
            let listed: Vec<(&str, u64)> = names.iter().zip(&weights).map(|(name, weight)| (name.as_str(), *weight)).collect();
            let mut turned = listed.clone();
            turned.rotate_left(rotate % count);
            let (a, b) = (Maglev::build(&listed), Maglev::build(&turned));
            for n in 0..500u64 {
                let hash = hash(&n.to_le_bytes(), 3);
                prop_assert_eq!(listed[a.choose(hash).unwrap()].0, turned[b.choose(hash).unwrap()].0);
            }
        }
    }
}

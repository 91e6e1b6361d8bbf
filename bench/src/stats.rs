//! Medians of few, noisy runs, and how far they can be trusted.

use mover::units::{f64_of, u64_of};
use serde::Serialize;

/// Runs of one figure.
#[derive(Clone, Debug, Default)]
pub struct Runs(Vec<f64>);

/// A figure: the median of its runs and a range that holds the true median in about 19 of 20 cases (by order
/// statistics: nothing is assumed of how the runs are distributed). With fewer than six runs it is all of them.
#[derive(Clone, Copy, PartialEq, Debug, Serialize)]
pub struct Figure {
    /// Median.
    pub median: f64,
    /// Lower end of the range.
    pub low: f64,
    /// Upper end of the range.
    pub high: f64,
    /// Runs.
    pub runs: usize,
}

impl Runs {
    /// Adds a run.
    ///
    /// # Panics
    /// If it is not a number.
    pub fn push(&mut self, value: f64) {
        assert!(value.is_finite(), "a run gave {value}");
        self.0.push(value);
    }

    /// The figure.
    ///
    /// # Panics
    /// If there was no run.
    #[must_use]
    pub fn figure(&self) -> Figure {
        assert!(!self.0.is_empty(), "a figure needs a run");
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let outside = ranks_outside(count);
        let median = if count % 2 == 1 {
            sorted[count / 2]
        } else {
            f64::midpoint(sorted[count / 2 - 1], sorted[count / 2])
        };
        Figure { median, low: sorted[outside], high: sorted[count - 1 - outside], runs: count }
    }
}

impl FromIterator<f64> for Runs {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        let mut runs = Self::default();
        values.into_iter().for_each(|value| runs.push(value));
        runs
    }
}

/// How many of the lowest (and of the highest) of `count` sorted runs lie outside the range: the most for which the
/// chance that the true median lies outside it too stays under 5 % (a run is below the true median with chance 1/2).
fn ranks_outside(count: usize) -> usize {
    let mut outside = 0;
    let mut tail = 0.0;
    let mut ways = 1.0;
    for rank in 0..count / 2 {
        tail += ways / 2_f64.powi(i32::try_from(count).unwrap_or(i32::MAX));
        if 2.0 * tail > 0.05 {
            break;
        }
        outside = rank;
        ways *= f64_of(u64_of(count - rank)) / f64_of(u64_of(rank + 1));
    }
    outside
}

/// Two things measured in turns, so that what disturbs the machine disturbs both: A B, B A, A B, ...
///
/// # Errors
/// The first error of either.
pub fn in_turns<A, B, E>(
    rounds: usize,
    mut first: impl FnMut(usize) -> Result<A, E>,
    mut second: impl FnMut(usize) -> Result<B, E>,
) -> Result<Vec<(A, B)>, E> {
    let mut pairs = Vec::with_capacity(rounds);
    for round in 0..rounds {
        let pair = if round % 2 == 0 {
            let a = first(round)?;
            (a, second(round)?)
        } else {
            let b = second(round)?;
            (first(round)?, b)
        };
        pairs.push(pair);
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_their_ranges() {
        let figure = [5.0, 1.0, 3.0].into_iter().collect::<Runs>().figure();
        assert_eq!(figure, Figure { median: 3.0, low: 1.0, high: 5.0, runs: 3 });
        let figure = [4.0, 1.0, 3.0, 2.0].into_iter().collect::<Runs>().figure();
        assert_eq!(figure, Figure { median: 2.5, low: 1.0, high: 4.0, runs: 4 });
        // The well-known table: with 9 runs the second and the eighth, with 15 the fourth and the twelfth.
        assert_eq!([1, 2, 5, 6, 8, 9, 12, 15, 20].map(ranks_outside), [0, 0, 0, 0, 0, 1, 2, 3, 5]);
    }

    #[test]
    fn turns_alternate() {
        let order = std::cell::RefCell::new(String::new());
        let pairs = in_turns::<_, _, ()>(
            3,
            |round| Ok((order.borrow_mut().push('a'), round).1),
            |round| Ok((order.borrow_mut().push('b'), round * 10).1),
        );
        assert_eq!(pairs, Ok(vec![(0, 0), (1, 10), (2, 20)]));
        assert_eq!(*order.borrow(), "abbaab");
    }
}

//! In which order the guests of a host leave it: pure decisions from what each would take of the two pipes there are.
//!
//! Guests that are bound by the link get it one at a time: two that share it take as long together, but each is on its way
//! for longer, and sends anew what it has dirtied meanwhile. Beside one of them goes one that the target's disk is busy with.
//! Of those bound by the same pipe the shortest goes first, so that most guests are away early. A guest that is nearly there
//! leaves its pipe to the next: a migration takes a moment until it sends. Whether it is nearly there is what its own migration
//! tells. What a plan says less the time that has passed would not do: guests that share a pipe take longer than planned, and
//! if each of them let another one begin early, all of them would share it in the end.

#![forbid(unsafe_code)]

/// A guest with so much left, in seconds, is nearly there.
const NEARLY_S: f64 = 0.5;

/// What a guest would take, alone.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Load {
    /// Seconds that the link is busy with it.
    pub link_s: f64,
    /// Seconds that the target's disk is.
    pub disk_s: f64,
}

/// A guest that is on its way.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct UnderWay {
    /// What it was to take.
    pub load: Load,
    /// In how many seconds it will have restarted, if its migration can say.
    pub left_s: Option<f64>,
}

/// One of the two.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pipe {
    Link,
    Disk,
}

impl Load {
    fn bound_by(&self) -> Pipe {
        if self.disk_s > self.link_s { Pipe::Disk } else { Pipe::Link }
    }
    fn seconds(&self) -> f64 {
        self.link_s.max(self.disk_s)
    }
}

/// Which of `waiting` is to leave now, beside those that are under way; none: one of these is to arrive first, or nobody
/// waits.
#[must_use]
pub fn next(waiting: &[Load], under_way: &[UnderWay]) -> Option<usize> {
    let busy = |guest: &&UnderWay| guest.left_s.is_none_or(|left| left > NEARLY_S);
    let free = |pipe| under_way.iter().filter(busy).all(|guest| guest.load.bound_by() != pipe);
    let of = |pipe| waiting.iter().enumerate().filter(move |(_, load)| load.bound_by() == pipe);
    let work = |pipe| of(pipe).map(|(_, load)| load.seconds()).sum::<f64>();
    // What takes longer in all begins first.
    let pipes =
        if work(Pipe::Disk) > work(Pipe::Link) { [Pipe::Disk, Pipe::Link] } else { [Pipe::Link, Pipe::Disk] };
    pipes.into_iter().filter(|pipe| free(*pipe)).find_map(|pipe| {
        of(pipe).min_by(|(_, one), (_, other)| one.seconds().total_cmp(&other.seconds())).map(|(at, _)| at)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn load(link_s: f64, disk_s: f64) -> Load {
        Load { link_s, disk_s }
    }
    const LONG: Load = load(9.0, 1.0);
    const SHORT: Load = load(4.0, 0.0);
    const FILES: Load = load(1.0, 3.0);

    /// Under way, and nothing said yet.
    const fn begun(load: Load) -> UnderWay {
        UnderWay { load, left_s: None }
    }

    #[test]
    fn one_a_pipe_the_shortest_first() {
        let (short, files) = (begun(SHORT), begun(FILES));
        assert_eq!(next(&[LONG, FILES, SHORT], &[]), Some(2), "the link has more to do");
        assert_eq!(next(&[LONG, FILES], &[short]), Some(1), "the disk is free");
        assert_eq!(next(&[LONG, FILES], &[short, files]), None, "nothing is free");
        assert_eq!(next(&[LONG, SHORT], &[begun(LONG)]), None, "two on the link are no faster");
        assert_eq!(next(&[LONG, SHORT], &[files]), Some(1));
        assert_eq!(next(&[SHORT, FILES, FILES], &[]), Some(1), "the disk has more to do");
        assert_eq!(next(&[], &[]), None);
    }

    #[test]
    fn the_next_begins_when_one_says_that_it_is_nearly_there() {
        let tiny = load(0.1, 0.0);
        for (left_s, next_one) in
            [(None, None), (Some(0.6), None), (Some(0.4), Some(0)), (Some(0.0), Some(0))]
        {
            assert_eq!(next(&[SHORT], &[UnderWay { load: LONG, left_s }]), next_one, "{left_s:?}");
            assert_eq!(
                next(&[SHORT], &[UnderWay { load: tiny, left_s }]),
                next_one,
                "planned short, {left_s:?}"
            );
        }
    }

    /// Plays an evacuation in which the first to begin is the first to arrive: every guest leaves, and there are never more than
    /// one a pipe on their way.
    #[test]
    fn everybody_leaves() {
        let mut waiting = vec![LONG, FILES, SHORT, FILES, LONG, load(0.1, 0.0), load(2.0, 2.0)];
        let (mut under_way, mut gone) = (Vec::new(), 0);
        while !waiting.is_empty() || !under_way.is_empty() {
            while let Some(at) = next(&waiting, &under_way) {
                under_way.push(begun(waiting.remove(at)));
            }
            assert!((1..=2).contains(&under_way.len()));
            under_way.remove(0);
            gone += 1;
        }
        assert_eq!(gone, 7);
    }
}

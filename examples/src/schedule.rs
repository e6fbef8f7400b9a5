//! The learning rate over a run.

/// Warm-up, plateau, linear decay to zero.
///
/// ```text
/// scale(step) = min(1, step / warmup, (steps + 1 - step) / decay),   step = 1 .. steps
/// ```
///
/// Velvet's entropy-driven warm-up needs no warm-up here.
///
/// # References
/// Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations, arXiv 2405.18392.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Steps of the whole run.
    pub steps: u64,
    /// Share of them that warm up.
    pub warmup: f64,
    /// Share of them that decay.
    pub decay: f64,
}

impl Schedule {
    /// What the learning rate of step 1 .. `steps` is multiplied with.
    pub fn scale(&self, step: u64) -> f64 {
        let part = |share: f64| (self.steps as f64 * share).max(1.0);
        let up = step as f64 / part(self.warmup);
        let down = (self.steps + 1).saturating_sub(step) as f64 / part(self.decay);
        up.min(down).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    #[test]
    fn rises_stays_and_falls() {
        let schedule = Schedule { steps: 100, warmup: 0.1, decay: 0.5 };
        assert_eq!(schedule.scale(1), 0.1);
        assert_eq!(schedule.scale(10), 1.0);
        assert_eq!(schedule.scale(51), 1.0);
        assert_eq!(schedule.scale(76), 0.5);
        assert_eq!(schedule.scale(100), 0.02);
        assert_eq!(Schedule { warmup: 0.0, ..schedule }.scale(1), 1.0);
        assert_eq!(Schedule { steps: 1, warmup: 0.0, decay: 0.5 }.scale(1), 1.0);
    }
}

//! Where an optimizer's numbers are: here, or on the device that its parameters are on.

use crate::adaptive::{Adaptive, Averages};
use crate::backend::{Failure, Resident};
use crate::error::{Error, Result};
use crate::group::Training;
use crate::parameter::UpdateSize;
use crate::state::Slot;
use crate::stats::Stats;
use crate::velvet::Velvet;

/// All numbers of an optimizer that change from step to step, but for the state arrays.
pub(crate) struct Snapshot {
    pub(crate) stats: Stats,
    pub(crate) averages: Averages,
    /// The products of the betas applied to each parameter.
    pub(crate) products: Vec<[f64; 2]>,
    /// What was measured of each parameter's last update.
    pub(crate) sizes: Vec<Option<UpdateSize>>,
}

impl Velvet {
    /// The numbers as they are now, waiting for the device where they are there.
    ///
    /// # Errors
    /// They cannot be read, or a step failed that was not reported yet.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        match &self.resident {
            Some(resident) => {
                self.raise_failure(true)?;
                resident.snapshot()
            }
            None => Ok(self.held()),
        }
    }

    /// The numbers that are kept here.
    fn held(&self) -> Snapshot {
        Snapshot {
            stats: self.stats,
            averages: self.adaptive.averages(),
            products: self.parameters.iter().map(|parameter| parameter.beta_products).collect(),
            sizes: self.parameters.iter().map(|parameter| parameter.size).collect(),
        }
    }

    /// Brings the numbers here.
    pub(crate) fn pull(&mut self) -> Result<()> {
        if self.resident.is_none() {
            return Ok(());
        }
        let Snapshot { stats, averages, products, sizes } = self.snapshot()?;
        self.stats = stats;
        self.adaptive = Adaptive::new(&self.config, averages);
        for ((parameter, products), size) in self.parameters.iter_mut().zip(products).zip(sizes) {
            (parameter.beta_products, parameter.size) = (products, size);
        }
        Ok(())
    }

    /// Brings the numbers, as they are here, to where they belong: to the device, where all parameters are on one and
    /// it has kernels for them.
    pub(crate) fn settle(&mut self) -> Result<()> {
        self.resident = Resident::new(&self.parameters, &self.config)?;
        let held = self.held();
        let Some(resident) = &mut self.resident else {
            // Candle operations read no blocks of 8 bits; nothing reads those of a parameter that is frozen.
            let trained = self.parameters.iter_mut().filter(|p| p.plan.training == Training::On);
            let slots = trained.flat_map(|parameter| &mut parameter.slots);
            return slots.filter(|slot| !slot.is_on_host()).try_for_each(Slot::widen);
        };
        resident.push(&self.parameters, self.config.lr, &held)
    }

    /// Reports a step that failed on the device, once; with `wait` false only one that is known without waiting.
    pub(crate) fn raise_failure(&self, wait: bool) -> Result<()> {
        let Some(resident) = &self.resident else { return Ok(()) };
        let Some(Failure { step, norm, positions }) = resident.failure(wait)? else { return Ok(()) };
        let parameters = positions.into_iter().filter_map(|at| self.parameters.get(at));
        let names = parameters.map(|parameter| parameter.describe(self.naming)).collect();
        Err(Error::NonFiniteGradients { step, norm, names })
    }
}

//! The invalid annotations of drivers, each reported once.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;

use balancer_core::{InvalidField, JobId, PolicyOverrides};

/// A driver with invalid annotations.
#[derive(Clone, Debug, PartialEq)]
pub struct InvalidAnnotation {
    /// Its job.
    pub job: Arc<JobId>,
    /// The driver's name.
    pub driver: Arc<str>,
    /// The driver's uid.
    pub uid: Box<str>,
    /// The invalid values that were not reported yet.
    pub invalid: Vec<InvalidField>,
    /// What is used instead, as far as it is known here.
    pub in_use: PolicyOverrides,
}

impl InvalidAnnotation {
    /// What is used instead of an invalid value, for the person who edited it.
    pub fn fallback(&self, invalid: &InvalidField) -> String {
        let value = self.in_use.value(invalid.field);
        value.map_or_else(|| "still using the previous value".to_owned(), |value| format!("still using {value}"))
    }
}

/// The invalid annotations that were not taken yet, by job and driver.
#[derive(Debug, Default)]
pub(super) struct InvalidAnnotations(BTreeMap<(Arc<JobId>, Arc<str>), InvalidAnnotation>);

impl InvalidAnnotations {
    /// Updates what is to be reported of a driver. `annotation` has the values that became invalid, `now` all that are
    /// invalid.
    pub(super) fn update(&mut self, annotation: InvalidAnnotation, now: &[InvalidField]) {
        let key = (Arc::clone(&annotation.job), Arc::clone(&annotation.driver));
        let mut invalid = self.0.remove(&key).map(|earlier| earlier.invalid).unwrap_or_default();
        // Values that were not taken yet may have been corrected meanwhile.
        invalid.retain(|earlier| now.contains(earlier));
        invalid.extend(annotation.invalid);
        if !invalid.is_empty() {
            self.0.insert(key, InvalidAnnotation { invalid, ..annotation });
        }
    }

    pub(super) fn remove(&mut self, job: &Arc<JobId>, driver: Arc<str>) {
        self.0.remove(&(Arc::clone(job), driver));
    }

    pub(super) fn take(&mut self) -> Vec<InvalidAnnotation> {
        mem::take(&mut self.0).into_values().collect()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

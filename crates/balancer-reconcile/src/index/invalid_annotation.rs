//! The invalid annotations of drivers, each reported once.

use std::collections::BTreeMap;
use std::iter;
use std::sync::Arc;

use balancer_core::{InvalidField, JobId, PolicyOverrides};

use super::job::DriverRef;

/// A driver with invalid annotations.
#[derive(Clone, Debug, PartialEq)]
pub struct InvalidAnnotation {
    /// Its job; `None` for a driver of many jobs.
    pub job: Option<Arc<JobId>>,
    /// The driver.
    pub driver: DriverRef,
    /// The invalid values that were not reported yet.
    pub invalid: Vec<InvalidField>,
    /// What is used instead, as far as it is known here.
    pub in_use: PolicyOverrides,
}

impl InvalidAnnotation {
    /// What is used instead of an invalid value, for the person who edited it.
    pub fn fallback(&self, invalid: &InvalidField) -> String {
        let value = self.in_use.value(invalid.field);
        value.map_or_else(
            || "using the last valid value, or else the default".to_owned(),
            |value| format!("still using {value}"),
        )
    }
}

/// The invalid annotations that were not taken yet, by namespace and driver.
#[derive(Debug, Default)]
pub(super) struct InvalidAnnotations(BTreeMap<(String, String), InvalidAnnotation>);

impl InvalidAnnotations {
    /// Updates what is to be reported of a driver. `annotation` has the values that became invalid, `now` all that are
    /// invalid.
    pub(super) fn update(&mut self, annotation: InvalidAnnotation, now: &[InvalidField]) {
        if now.is_empty() && self.0.is_empty() {
            return;
        }
        let key = (annotation.driver.namespace.clone(), annotation.driver.name.clone());
        let mut invalid = self.0.remove(&key).map(|earlier| earlier.invalid).unwrap_or_default();
        // Values that were not taken yet may have been corrected meanwhile.
        invalid.retain(|earlier| now.contains(earlier));
        invalid.extend(annotation.invalid);
        if !invalid.is_empty() {
            self.0.insert(key, InvalidAnnotation { invalid, ..annotation });
        }
    }

    pub(super) fn remove(&mut self, namespace: &str, driver: &str) {
        if !self.0.is_empty() {
            self.0.remove(&(namespace.to_owned(), driver.to_owned()));
        }
    }

    pub(super) fn take(&mut self, most: usize) -> Vec<InvalidAnnotation> {
        iter::from_fn(|| self.0.pop_first()).map(|(_, annotation)| annotation).take(most).collect()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

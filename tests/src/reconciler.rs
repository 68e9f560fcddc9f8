//! The reconciler's release binary.

use std::ops::{Deref, DerefMut};

use anyhow::Result;

use crate::port;
use crate::release::Release;

/// What a reconciler process starts with, besides its port.
pub use crate::release::Options as ReconcilerOptions;

/// A running reconciler. Dropping it kills it.
#[derive(Debug)]
pub struct Reconciler {
    release: Release,
    /// Where it serves the page of jobs.
    pub page_port: u16,
}

impl Reconciler {
    /// Starts a reconciler and waits until it says that it is ready.
    pub async fn start(options: ReconcilerOptions) -> Result<Self> {
        let mut reconciler = Self::begin(options)?;
        reconciler.until_ready().await?;
        Ok(reconciler)
    }

    /// Starts a reconciler and waits for nothing.
    pub fn begin(options: ReconcilerOptions) -> Result<Self> {
        let page_port = port::free()?;
        let needed = ReconcilerOptions::default().env("PAGE_PORT", page_port.to_string());
        Ok(Self { release: Release::begin("balancer-reconcile", needed, options)?, page_port })
    }

    /// Whether it says that it leads.
    pub async fn leads(&self) -> Result<bool> {
        Ok(self.metrics().await?.sum("spot_balancer_reconcile_leader", &[]) == Some(1.0))
    }

    /// Ends it at once (SIGKILL), as does dropping it.
    pub fn kill(self) {}
}

impl Deref for Reconciler {
    type Target = Release;

    fn deref(&self) -> &Release {
        &self.release
    }
}

impl DerefMut for Reconciler {
    fn deref_mut(&mut self) -> &mut Release {
        &mut self.release
    }
}

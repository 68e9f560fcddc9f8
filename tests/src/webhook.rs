//! The webhook's release binary.

use std::ops::{Deref, DerefMut};

use anyhow::Result;
use kube::Client;

use crate::certificate::{ServerCertificate, authority};
use crate::endpoint;
use crate::port;
use crate::release::Release;

/// What a webhook process starts with, besides its ports and its certificate. Without
/// [`redis`](WebhookOptions::redis) the ledger is in memory.
pub use crate::release::Options as WebhookOptions;

/// A running webhook. Dropping it kills it.
#[derive(Debug)]
pub struct Webhook {
    release: Release,
    /// Where it serves HTTPS.
    pub port: u16,
    /// Its certificate; renew it by [`Authority::renew`](crate::certificate::Authority::renew).
    pub certificate: ServerCertificate,
}

impl Webhook {
    /// Starts a webhook and waits until it says that it is ready.
    pub async fn start(options: WebhookOptions) -> Result<Self> {
        let mut webhook = Self::begin(options)?;
        webhook.until_ready().await?;
        Ok(webhook)
    }

    /// Starts a webhook and waits for nothing.
    pub fn begin(options: WebhookOptions) -> Result<Self> {
        let certificate = authority()?.issue()?;
        let port = port::free()?;
        let needed = WebhookOptions::default()
            .env("STORE", "memory")
            .env("PORT", port.to_string())
            .env("TLS_CERT_PATH", &certificate.path)
            .env("TLS_KEY_PATH", &certificate.key_path);
        Ok(Self { release: Release::begin("balancer-webhook", needed, options)?, port, certificate })
    }

    /// A new client of its HTTPS port, for reviews that no apiserver sends.
    pub fn client(&self) -> Result<Client> {
        endpoint::client(&endpoint::https(self.port))
    }

    /// Ends it at once (SIGKILL), as does dropping it.
    pub fn kill(self) {}
}

impl Deref for Webhook {
    type Target = Release;

    fn deref(&self) -> &Release {
        &self.release
    }
}

impl DerefMut for Webhook {
    fn deref_mut(&mut self) -> &mut Release {
        &mut self.release
    }
}

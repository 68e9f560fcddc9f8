//! Tokens of AWS instead of a password: a signed request that is never sent, which the server verifies.

use std::error::Error;
use std::iter;
use std::time::{Duration, SystemTime};

use aws_config::{BehaviorVersion, SdkConfig};
use aws_credential_types::Credentials as AwsCredentials;
use aws_credential_types::provider::ProvideCredentials;
use aws_sigv4::http_request::{SignableBody, SignableRequest, SignatureLocation, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_http_client::tls;
use tokio::sync::OnceCell;

use super::credentials::{CredentialSource, Login};
use super::options::{AwsIam, AwsService};
use crate::StoreError;

/// How long a token is valid: the most that AWS accepts.
const LIFETIME: Duration = Duration::from_secs(900);
/// AWS credentials that have expired are not asked for in a loop.
const SHORTEST_RENEWAL: Duration = Duration::from_secs(1);

/// Issues the tokens of one user.
pub(super) struct AwsIamTokens {
    iam: AwsIam,
    user: String,
    /// The region and the provider of credentials, once there is a region.
    config: OnceCell<SdkConfig>,
}

impl AwsIamTokens {
    /// For this user of the servers. Nothing is asked yet.
    pub(super) fn new(iam: AwsIam, user: String) -> Self {
        Self { iam, user, config: OnceCell::new() }
    }

    /// By the default chain of AWS: the environment, a profile, the token of a service account (IRSA), EKS Pod Identity,
    /// and the metadata of the instance (IMDS).
    async fn config(&self) -> Result<&SdkConfig, StoreError> {
        let load = async || {
            let ring = tls::Provider::Rustls(tls::rustls_provider::CryptoMode::Ring);
            let client = aws_smithy_http_client::Builder::new().tls_provider(ring).build_https();
            let config = aws_config::defaults(BehaviorVersion::v2026_01_12()).http_client(client).load().await;
            if config.region().is_none() {
                return Err(failed("no AWS region was found; set AWS_REGION"));
            }
            Ok(config)
        };
        self.config.get_or_try_init(load).await
    }
}

impl CredentialSource for AwsIamTokens {
    /// The AWS credentials are asked for each time, so that they are valid for as long as possible.
    async fn login(&self) -> Result<(Login, Duration), StoreError> {
        let config = self.config().await?;
        let (Some(region), Some(provider)) = (config.region(), config.credentials_provider()) else {
            return Err(failed("there is no provider of AWS credentials"));
        };
        let credentials = provider
            .provide_credentials()
            .await
            .map_err(|error| failed(&format!("no AWS credentials were found: {}", with_causes(&error))))?;
        let (now, expiry) = (SystemTime::now(), credentials.expiry());
        let password = token(&self.iam, &self.user, region.as_ref(), credentials, now)?;
        Ok((Login { user: Some(self.user.clone()), password }, renew_after(expiry, now)))
    }
}

/// After two thirds of a token's life. That ends with the AWS credentials that signed it.
fn renew_after(expiry: Option<SystemTime>, now: SystemTime) -> Duration {
    let left = expiry.map_or(LIFETIME, |expiry| expiry.duration_since(now).unwrap_or_default());
    (left.min(LIFETIME) * 2 / 3).max(SHORTEST_RENEWAL)
}

/// A presigned URL without its scheme, valid from `now`. The name and the user need no escapes.
fn token(
    iam: &AwsIam,
    user: &str,
    region: &str,
    credentials: AwsCredentials,
    now: SystemTime,
) -> Result<String, StoreError> {
    let (service, resource_type) = match iam.service {
        AwsService::ElastiCache => ("elasticache", ""),
        AwsService::ElastiCacheServerless => ("elasticache", "&ResourceType=ServerlessCache"),
        AwsService::MemoryDb => ("memorydb", ""),
    };
    let url = format!("http://{}/?Action=connect&User={user}{resource_type}", iam.cache_name.to_lowercase());
    let signed = || {
        let mut settings = SigningSettings::default();
        settings.signature_location = SignatureLocation::QueryParams;
        settings.expires_in = Some(LIFETIME);
        let identity = credentials.into();
        let signing = v4::SigningParams::builder().identity(&identity).region(region).name(service).time(now);
        let request = SignableRequest::new("GET", &url, iter::empty(), SignableBody::Bytes(&[]))?;
        let (instructions, _) = sign(request, &signing.settings(settings).build()?.into())?.into_parts();
        let mut request = http::Request::get(&url).body(())?;
        instructions.apply_to_request_http1x(&mut request);
        Ok(request.uri().to_string())
    };
    let signed = signed().map_err(|error: Box<dyn Error + Send + Sync>| failed(&with_causes(&*error)))?;
    Ok(signed.trim_start_matches("http://").to_owned())
}

fn failed(why: &str) -> StoreError {
    StoreError::NoConnection(format!("no token for REDIS_AWS_IAM: {why}"))
}

/// An error and its causes. Those of AWS name what was asked, and never contain a secret.
fn with_causes(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(Some(error), |&error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn signed(service: AwsService, session: Option<&str>) -> String {
        let credentials = AwsCredentials::new("accessKey", "secretKey", session.map(str::to_owned), None, "test");
        let iam = AwsIam { service, cache_name: "My-Cache".to_owned() };
        // 2024-08-02T12:11:50Z
        token(&iam, "user123", "eu-west-1", credentials, at(1_722_600_710)).expect("signed")
    }

    #[test]
    fn a_token_is_a_presigned_url_without_its_scheme() {
        assert_eq!(
            signed(AwsService::ElastiCacheServerless, None),
            "my-cache/?Action=connect&User=user123&ResourceType=ServerlessCache&X-Amz-Algorithm=AWS4-HMAC-SHA256\
             &X-Amz-Credential=accessKey%2F20240802%2Feu-west-1%2Felasticache%2Faws4_request\
             &X-Amz-Date=20240802T121150Z&X-Amz-Expires=900&X-Amz-SignedHeaders=host\
             &X-Amz-Signature=5dda5db919b1337db6596b2a608924bc10197fb39289b933b60bdb114d5a70dc"
        );
    }

    #[test]
    fn a_token_names_its_service_and_the_session_of_temporary_credentials() {
        let token = signed(AwsService::MemoryDb, Some("se+ss/ion="));
        assert!(token.contains("%2Fmemorydb%2F") && !token.contains("ResourceType"), "{token}");
        assert!(token.contains("&X-Amz-Security-Token=se%2Bss%2Fion%3D"), "{token}");
        assert!(signed(AwsService::ElastiCache, None).contains("%2Felasticache%2F"));
    }

    #[test]
    fn a_token_is_renewed_after_ten_minutes_or_earlier_if_its_credentials_expire() {
        let now = at(1_000_000);
        assert_eq!(renew_after(None, now), Duration::from_secs(600));
        assert_eq!(renew_after(Some(now + Duration::from_secs(43_200)), now), Duration::from_secs(600));
        assert_eq!(renew_after(Some(now + Duration::from_secs(300)), now), Duration::from_secs(200));
        assert_eq!(renew_after(Some(now - Duration::from_secs(300)), now), SHORTEST_RENEWAL);
    }
}

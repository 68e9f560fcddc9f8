//! `--test-admission`: creates an executor by a dry run, to find out whether the apiserver sends executors to the
//! webhook.

use std::time::Duration;

use anyhow::{Context, bail};
use balancer_core::Conventions;
use balancer_runtime::admission_probe::{AdmissionProbe, Admitted, LIMIT, ProbeError};
use balancer_runtime::cluster::{chain, client};

/// Longer than [`LIMIT`].
const API_READ_TIMEOUT: Duration = Duration::from_secs(60);

/// An executor that is created by a dry run in one namespace.
#[derive(Debug)]
pub(crate) struct AdmissionTest {
    pub(crate) namespace: String,
    pub(crate) conventions: Conventions,
}

impl AdmissionTest {
    /// Runs the test in the cluster of the environment, and prints the result.
    ///
    /// # Errors
    /// There is no access to the cluster, it refused the executor, or the webhook did not change the executor.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let client = client(API_READ_TIMEOUT).await.context("--test-admission")?;
        println!("{}", self.result(client).await?);
        Ok(())
    }

    async fn result(&self, client: kube::Client) -> anyhow::Result<String> {
        let namespace = &self.namespace;
        let probe = AdmissionProbe(&self.conventions);
        match probe.run(&client, namespace).await {
            Ok(Admitted::Placed(decision)) => Ok(format!(
                "The webhook answers in the namespace {namespace}: {decision}. It was a dry run, which creates nothing."
            )),
            Ok(Admitted::Overridden(capacity)) => bail!(
                "another webhook makes the executors of the namespace {namespace} require {capacity}, or removes the \
                 annotations of this one. Find it among the MutatingWebhookConfigurations and let it leave executors out"
            ),
            Ok(Admitted::Unchanged) => bail!(
                "the webhook did not change an executor in the namespace {namespace}. Check that the namespaceSelector \
                 of the MutatingWebhookConfiguration selects the namespace, that the webhook's pods are ready, that \
                 the caBundle belongs to the certificate that they serve, and that their labels and annotations are \
                 configured like those of this command. The apiserver's log says why a call failed"
            ),
            Err(ProbeError::TimedOut) => bail!(
                "the Kubernetes API did not answer the dry run of an executor in the namespace {namespace} within \
                 {LIMIT:?}. Check the address of the cluster, and the other admission webhooks of the namespace"
            ),
            Err(ProbeError::Failed(error)) => bail!(
                "the dry run of an executor in the namespace {namespace} failed: {}. Check that the namespace exists, \
                 that you may create pods in it, and that no other policy or quota refuses the pod",
                chain(&error)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use http::{Method, Request, Response};
    use http_body_util::BodyExt;
    use kube::client::Body;
    use serde_json::{Value, json};
    use tower_test::mock;

    fn test(conventions: Conventions) -> AdmissionTest {
        AdmissionTest { namespace: "etl".into(), conventions }
    }

    /// Runs the test in a Kubernetes API that answers each creation with what `change` makes of the pod.
    async fn run(test: AdmissionTest, change: impl Fn(&mut Value)) -> anyhow::Result<String> {
        let (service, mut api) = mock::pair::<Request<Body>, Response<Body>>();
        let answering = async {
            let (request, answer) = api.next_request().await.expect("no request to the API");
            let (head, body) = request.into_parts();
            assert_eq!(head.method, Method::POST);
            assert_eq!(head.uri.path(), "/api/v1/namespaces/etl/pods");
            assert!(head.uri.query().is_some_and(|query| query.contains("dryRun=All")), "{}", head.uri);
            let body = body.collect().await.expect("the body is in memory").to_bytes();
            let mut pod = serde_json::from_slice(&body).expect("the body is JSON");
            change(&mut pod);
            answer.send_response(Response::new(Body::from(pod.to_string().into_bytes())));
        };
        tokio::join!(test.result(kube::Client::new(service, "default")), answering).0
    }

    #[tokio::test]
    async fn an_executor_with_a_decision_passes() {
        let said = run(test(Conventions::default()), |pod| {
            assert_eq!(pod["metadata"]["labels"]["spark-role"], "executor");
            assert_eq!(pod["metadata"]["annotations"]["workload/spot-ratio"], "0");
            let job = pod["metadata"]["labels"]["spark-app-selector"].as_str().expect("no job id");
            assert_eq!(pod["metadata"]["name"], format!("{job}-exec-1"));
            pod["metadata"]["annotations"]["workload/capacity-type"] = "on-demand".into();
        })
        .await
        .expect("the webhook placed it");
        assert!(said.contains("namespace etl") && said.contains("workload/capacity-type=on-demand"), "{said}");
    }

    #[tokio::test]
    async fn an_executor_without_a_decision_fails_with_what_to_check() {
        let error = run(test(Conventions::default()), |_| ()).await.expect_err("nothing changed it").to_string();
        for check in ["namespace etl", "namespaceSelector", "pods are ready", "caBundle"] {
            assert!(error.contains(check), "{error}");
        }
    }

    #[tokio::test]
    async fn without_a_decision_annotation_the_required_capacity_is_checked() {
        let conventions = Conventions { decision_annotation: None, ..Conventions::default() };
        let label = conventions.capacity_labels.label.clone();
        let selector = |pod: &mut Value| pod["spec"]["nodeSelector"] = json!({&label: "on-demand"});
        let affinity = |pod: &mut Value| {
            let terms = json!([{"matchExpressions": [{"key": label, "operator": "DoesNotExist"}]}]);
            let required = json!({"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}});
            pod["spec"]["affinity"]["nodeAffinity"] = required;
        };
        let of_another = |pod: &mut Value| pod["spec"]["nodeSelector"] = json!({"pool": "etl"});
        let said = run(test(conventions.clone()), selector).await.expect("it has the selector");
        assert!(said.contains("DECISION_ANNOTATION is empty"), "{said}");
        run(test(conventions.clone()), affinity).await.expect("it has the affinity");
        run(test(conventions), of_another).await.expect_err("another webhook's selector");
        let spot = |pod: &mut Value| pod["spec"]["nodeSelector"] = json!({"karpenter.sh/capacity-type": "spot"});
        let created =
            |pod: &mut Value| (pod["metadata"]["namespace"], pod["metadata"]["uid"]) = ("etl".into(), "u".into());
        let error =
            run(test(Conventions::default()), |pod| (created(pod), spot(pod)).0).await.expect_err("it was overridden");
        assert!(error.to_string().contains("require spot"), "{error}");
    }

    #[tokio::test]
    async fn a_refusal_is_reported_with_the_reason_of_the_api() {
        let (service, mut api) = mock::pair::<Request<Body>, Response<Body>>();
        let refusing = async {
            let (_, answer) = api.next_request().await.expect("no request to the API");
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": 403,
                "reason": "Forbidden", "message": "exceeded quota: pods",
            });
            let refused = Response::builder().status(403).body(Body::from(status.to_string().into_bytes()));
            answer.send_response(refused.expect("the response is valid"));
        };
        let test = test(Conventions::default());
        let (result, ()) = tokio::join!(test.result(kube::Client::new(service, "default")), refusing);
        let error = result.expect_err("it was refused").to_string();
        assert!(error.contains("exceeded quota: pods") && error.contains("create pods"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_api_costs_at_most_the_limit() {
        let (service, _api) = mock::pair::<Request<Body>, Response<Body>>();
        let begin = tokio::time::Instant::now();
        let test = test(Conventions::default());
        let error = test.result(kube::Client::new(service, "default")).await.expect_err("no answer").to_string();
        assert!(error.contains("within 40s"), "{error}");
        assert_eq!(begin.elapsed(), LIMIT);
    }
}

//! What stands for the cluster's DNS: one `/etc/hosts` for all containers, to which lines are added while they
//! run. A name, once told, keeps its address.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::process::scratch_path;

type Labels = BTreeMap<String, String>;

/// The names of a namespace's pods and headless Services.
#[derive(Debug)]
pub(crate) struct Hosts {
    path: PathBuf,
    file: File,
    namespace: String,
    pods: Vec<(Labels, Ipv4Addr)>,
    services: BTreeMap<String, Labels>,
    told: BTreeSet<String>,
}

impl Hosts {
    /// With the apiserver's name alone.
    pub(crate) fn new(namespace: &str, apiserver: (&str, Ipv4Addr)) -> Result<Self> {
        let path = scratch_path("hosts")?;
        let mut hosts = Self {
            file: File::create(&path)?,
            path,
            namespace: namespace.to_owned(),
            pods: Vec::new(),
            services: BTreeMap::new(),
            told: BTreeSet::new(),
        };
        hosts.tell("localhost", Ipv4Addr::LOCALHOST)?;
        hosts.tell(apiserver.0, apiserver.1)?;
        Ok(hosts)
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a pod: its host name, and that of each Service that selects it.
    pub(crate) fn pod(&mut self, name: &str, labels: Labels, address: Ipv4Addr) -> Result<()> {
        self.tell(name, address)?;
        self.pods.push((labels, address));
        self.resolve()
    }

    /// Adds a headless Service.
    pub(crate) fn service(&mut self, name: &str, selector: Labels) -> Result<()> {
        self.services.insert(name.to_owned(), selector);
        self.resolve()
    }

    fn resolve(&mut self) -> Result<()> {
        let mut found = Vec::new();
        for (service, selector) in &self.services {
            for (labels, address) in &self.pods {
                if selector.iter().all(|(key, value)| labels.get(key) == Some(value)) {
                    found.push((format!("{service}.{}.svc", self.namespace), *address));
                }
            }
        }
        found.into_iter().try_for_each(|(name, address)| self.tell(&name, address))
    }

    /// One write for a line, so that nobody reads half of it.
    fn tell(&mut self, name: &str, address: Ipv4Addr) -> Result<()> {
        let line = format!("{address} {name}\n");
        if self.told.insert(line.clone()) {
            self.file.write_all(line.as_bytes())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_service_has_the_addresses_of_the_pods_that_it_selects_whichever_came_first() -> Result<()> {
        let [api, first, second, other] = [2, 3, 4, 5].map(|last| Ipv4Addr::new(127, 9, 9, last));
        let mut hosts = Hosts::new("jobs", ("kubernetes.default.svc", api))?;
        hosts.pod("a", labels(&[("job", "a"), ("role", "driver")]), first)?;
        hosts.service("a-svc", labels(&[("job", "a")]))?;
        hosts.service("b-svc", labels(&[("job", "b"), ("role", "driver")]))?;
        hosts.pod("b", labels(&[("job", "b"), ("role", "driver")]), second)?;
        hosts.pod("b-1", labels(&[("job", "b"), ("role", "executor")]), other)?;
        let said = std::fs::read_to_string(hosts.path())?;
        let told = [
            "127.0.0.1 localhost",
            "127.9.9.2 kubernetes.default.svc",
            "127.9.9.3 a",
            "127.9.9.3 a-svc.jobs.svc",
            "127.9.9.4 b",
            "127.9.9.4 b-svc.jobs.svc",
            "127.9.9.5 b-1",
        ];
        assert_eq!(said.lines().collect::<Vec<_>>(), told);
        Ok(())
    }
}

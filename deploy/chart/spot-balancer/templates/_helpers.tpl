{{- define "spot-balancer.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Short enough that names with a suffix such as "-reconciler-metrics" stay valid. */}}
{{- define "spot-balancer.fullname" -}}
{{- $name := include "spot-balancer.name" . }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 43 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 43 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 43 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* The labels that select the pods and the objects of a component: (list $ "webhook") */}}
{{- define "spot-balancer.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "spot-balancer.name" $root | quote }}
app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/*
The labels of an object: (list $ "webhook"), and optionally labels of that object alone. commonLabels override the
chart's labels, except the labels of the selector.
*/}}
{{- define "spot-balancer.labels" -}}
{{- $root := index . 0 -}}
{{- $own := gt (len .) 2 | ternary (last .) dict -}}
{{- $ours := dict
  "app.kubernetes.io/part-of" "spot-balancer"
  "app.kubernetes.io/version" $root.Chart.AppVersion
  "app.kubernetes.io/managed-by" $root.Release.Service
  "helm.sh/chart" (printf "%s-%s" $root.Chart.Name ($root.Chart.Version | replace "+" "_")) -}}
{{- merge (include "spot-balancer.selector" . | fromYaml) (deepCopy $own) (deepCopy $root.Values.commonLabels) $ours | toYaml }}
{{- end }}

{{/* The labels of pods. None of them changes with the version of the chart, so an upgrade does not restart pods. */}}
{{- define "spot-balancer.podLabels" -}}
{{- $root := index . 0 -}}
{{- $ours := dict "app.kubernetes.io/part-of" "spot-balancer" -}}
{{- merge (include "spot-balancer.selector" . | fromYaml) (deepCopy $root.Values.commonLabels) $ours | toYaml }}
{{- end }}

{{/* The metadata of an object in this namespace: (list $ "webhook" "name"), and optionally labels of its own */}}
{{- define "spot-balancer.metadata" -}}
{{- $root := index . 0 -}}
name: {{ index . 2 | quote }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "spot-balancer.labels" (list $root (index . 1) (gt (len .) 3 | ternary (last .) dict)) | nindent 2 }}
{{- end }}

{{/* The metadata of a cluster-wide object: (list $ "webhook" "name") */}}
{{- define "spot-balancer.clusterMetadata" -}}
name: {{ index . 2 | quote }}
labels:
  {{- include "spot-balancer.labels" (list (index . 0) (index . 1)) | nindent 2 }}
{{- end }}

{{- define "spot-balancer.webhook" -}}
{{ include "spot-balancer.fullname" . }}-webhook
{{- end }}

{{- define "spot-balancer.reconciler" -}}
{{ include "spot-balancer.fullname" . }}-reconciler
{{- end }}

{{- define "spot-balancer.redis" -}}
{{ include "spot-balancer.fullname" . }}-redis
{{- end }}

{{/* An image reference: (list image "default tag") */}}
{{- define "spot-balancer.image" -}}
{{- $image := index . 0 -}}
{{ $image.repository }}{{ if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default (index . 1) }}{{ end }}
{{- end }}

{{/* Where the reconciler runs: deployment, webhook or none */}}
{{- define "spot-balancer.reconcilerMode" -}}
{{- .Values.reconciler.mode | default (eq .Values.store "memory" | ternary "webhook" "deployment") }}
{{- end }}

{{/* Not empty if the bundled Redis is used. */}}
{{- define "spot-balancer.redisIsBundled" -}}
{{- if and (eq .Values.store "redis") (not .Values.redis.url) (not .Values.redis.existingSecret.name) }}yes{{ end }}
{{- end }}

{{/* The memory store belongs to one process, so it allows one replica. */}}
{{- define "spot-balancer.webhookReplicas" -}}
{{- eq .Values.store "memory" | ternary 1 .Values.webhook.replicas }}
{{- end }}

{{/* Each source has a Secret of its own, so that a change of source does not reuse or overwrite the other's. */}}
{{- define "spot-balancer.tlsSecret" -}}
{{- if eq .Values.certificates.source "secret" }}
{{- .Values.certificates.secret.name }}
{{- else if eq .Values.certificates.source "helm" }}
{{- include "spot-balancer.webhook" . }}-helm-tls
{{- else }}
{{- include "spot-balancer.webhook" . }}-tls
{{- end }}
{{- end }}

{{/* The seconds of a duration such as 2160h or 1h30m. */}}
{{- define "spot-balancer.seconds" -}}
{{- $hours := regexFind "[0-9]+h" . | trimSuffix "h" | atoi -}}
{{- $minutes := regexFind "[0-9]+m" . | trimSuffix "m" | atoi -}}
{{- add (mul 3600 $hours) (mul 60 $minutes) (regexFind "[0-9]+s" . | trimSuffix "s" | atoi) }}
{{- end }}

{{/* The settings that webhook and reconciler share. */}}
{{- define "spot-balancer.sharedEnvironment" -}}
{{- $settings := .Values.settings -}}
- name: STORE
  value: {{ .Values.store | quote }}
{{- if eq .Values.store "redis" }}
- name: REDIS_URL
  {{- if include "spot-balancer.redisIsBundled" . }}
  value: redis://{{ include "spot-balancer.redis" . }}.{{ .Release.Namespace }}.svc:{{ int .Values.redis.bundled.port }}
  {{- else if .Values.redis.url }}
  valueFrom: {secretKeyRef: {name: {{ include "spot-balancer.redis" . | quote }}, key: url}}
  {{- else }}
  valueFrom: {secretKeyRef: {name: {{ .Values.redis.existingSecret.name | quote }}, key: {{ .Values.redis.existingSecret.key | quote }}}}
  {{- end }}
{{- if .Values.redis.ca }}
- name: SSL_CERT_FILE
  value: /redis-ca/ca.crt
{{- end }}
{{- end }}
- name: STORE_TIMEOUT_MILLISECONDS
  value: {{ int64 $settings.storeTimeoutMilliseconds | quote }}
- name: REDIS_DEFAULT_TTL_SECONDS
  value: {{ int64 $settings.redisDefaultTtlSeconds | quote }}
- name: DEFAULT_SPOT_RATIO
  value: {{ $settings.defaultSpotRatio | quote }}
- name: SPOT_PREFERENCE
  value: {{ $settings.spotPreference | quote }}
- name: CAPACITY_TYPE_LABEL
  value: {{ $settings.capacityTypeLabel | quote }}
- name: WORKLOAD_ROLE_LABEL
  value: {{ $settings.workloadRoleLabel | quote }}
- name: DRIVER_ROLE_VALUE
  value: {{ $settings.driverRoleValue | quote }}
- name: EXECUTOR_ROLE_VALUE
  value: {{ $settings.executorRoleValue | quote }}
- name: JOB_ID_LABEL
  value: {{ join "," $settings.jobIdLabel | quote }}
- name: SPOT_RATIO_ANNOTATION
  value: {{ $settings.spotRatioAnnotation | quote }}
- name: ON_DEMAND_BASE_ANNOTATION
  value: {{ $settings.onDemandBaseAnnotation | quote }}
- name: DECISION_ANNOTATION
  value: {{ $settings.decisionAnnotation | quote }}
- name: NODE_ROLE_SELECTOR
  value: {{ $settings.nodeRoleSelector | quote }}
- name: LOG_LEVEL
  value: {{ $settings.logLevel | quote }}
- name: LOG_FORMAT
  value: {{ $settings.logFormat | quote }}
{{- end }}

{{/* The settings of the reconciler, in its own Deployment or in the webhook. */}}
{{- define "spot-balancer.reconcileEnvironment" -}}
- name: RECONCILE_INTERVAL_SECONDS
  value: {{ int64 .Values.settings.reconcileIntervalSeconds | quote }}
- name: RECONCILE_GRACE_SECONDS
  value: {{ int64 .Values.settings.reconcileGraceSeconds | quote }}
- name: RECONCILE_LEASE
  value: {{ include "spot-balancer.reconciler" . | quote }}
{{- with .Values.namespaces.names }}
- name: WATCH_NAMESPACES
  value: {{ join "," . | quote }}
{{- end }}
{{- end }}

{{- define "spot-balancer.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "spot-balancer.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* The scheduling of a component's pods: (list $ "webhook") */}}
{{- define "spot-balancer.placement" -}}
{{- $root := index . 0 -}}
{{- $placement := $root.Values.placement -}}
{{- with $placement.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with $placement.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $placement.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $placement.affinity }}
affinity:
  {{- toYaml $placement.affinity | nindent 2 }}
{{- else if eq $placement.onDemand "required" }}
affinity:
  nodeAffinity:
    requiredDuringSchedulingIgnoredDuringExecution:
      nodeSelectorTerms:
        - matchExpressions:
            - {key: {{ $root.Values.settings.capacityTypeLabel | quote }}, operator: In, values: [on-demand]}
{{- else if eq $placement.onDemand "preferred" }}
affinity:
  nodeAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        preference:
          matchExpressions:
            - {key: {{ $root.Values.settings.capacityTypeLabel | quote }}, operator: In, values: [on-demand]}
{{- end }}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: {{ $placement.spread }}
    {{- if semverCompare ">=1.27-0" $root.Capabilities.KubeVersion.Version }}
    # Spread the new replicas of a rollout on their own, without counting the old ones.
    matchLabelKeys: [pod-template-hash]
    {{- end }}
    labelSelector:
      matchLabels:
        {{- include "spot-balancer.selector" (list $root (index $ 1)) | nindent 8 }}
  {{- end }}
{{- end }}

{{/* Probes on the container's port "admin". */}}
{{- define "spot-balancer.probes" -}}
livenessProbe:
  httpGet: {path: /livez, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
{{- end }}

{{/* The PodDisruptionBudget of a component: (list $ "webhook" replicas) */}}
{{- define "spot-balancer.podDisruptionBudget" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $budget := (index $root.Values $component).podDisruptionBudget -}}
{{- if and $budget.enabled (gt (int (index . 2)) 1) -}}
# policy/v1 exists from Kubernetes 1.21 on.
apiVersion: {{ $root.Capabilities.APIVersions.Has "policy/v1" | ternary "policy/v1" "policy/v1beta1" }}
kind: PodDisruptionBudget
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (include (printf "spot-balancer.%s" $component) $root)) | nindent 2 }}
spec:
  maxUnavailable: {{ $budget.maxUnavailable }}
  {{- if semverCompare ">=1.27-0" $root.Capabilities.KubeVersion.Version }}
  # A pod that is not ready serves no requests, so it must not block the drain of its node.
  unhealthyPodEvictionPolicy: AlwaysAllow
  {{- end }}
  selector:
    matchLabels:
      {{- include "spot-balancer.selector" (list $root $component) | nindent 6 }}
{{- end }}
{{- end }}

{{- define "spot-balancer.serviceAccount" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (include (printf "spot-balancer.%s" $component) $root)) | nindent 2 }}
  {{- with (index $root.Values $component).serviceAccount.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
# Each pod mounts the token on its own.
automountServiceAccountToken: false
{{- end }}

{{/* Binds a ClusterRole to a component's ServiceAccount in the namespaces of jobs: (list $ "webhook" "role") */}}
{{- define "spot-balancer.bindWhereJobsRun" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $role := index . 2 -}}
{{- $labels := include "spot-balancer.labels" (list $root $component) -}}
{{- $account := include (printf "spot-balancer.%s" $component) $root -}}
{{- if $root.Values.namespaces.names }}
{{- range $root.Values.namespaces.names }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ $role | quote }}
  namespace: {{ . | quote }}
  labels:
    {{- $labels | nindent 4 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {{ $role | quote }}}
subjects:
  - {kind: ServiceAccount, name: {{ $account | quote }}, namespace: {{ $root.Release.Namespace | quote }}}
{{- end }}
{{- else }}
---
{{ include "spot-balancer.bindEverywhere" . }}
{{- end }}
{{- end }}

{{- define "spot-balancer.bindEverywhere" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $role := index . 2 -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  {{- include "spot-balancer.clusterMetadata" (list $root $component $role) | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: {{ $role | quote }}}
subjects:
  - {kind: ServiceAccount, name: {{ include (printf "spot-balancer.%s" $component) $root | quote }}, namespace: {{ $root.Release.Namespace | quote }}}
{{- end }}

{{/* The rights of the reconciler, for the component that it runs in. */}}
{{- define "spot-balancer.reconcileRights" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $account := include (printf "spot-balancer.%s" $component) $root -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  {{- include "spot-balancer.clusterMetadata" (list $root $component (printf "%s-reconcile" $account)) | nindent 2 }}
rules:
  # Live executors, and the annotations of their drivers.
  - apiGroups: [""]
    resources: [pods]
    verbs: [list, watch]
  # An Event on the driver reports an invalid ratio or base.
  - apiGroups: [events.k8s.io]
    resources: [events]
    verbs: [create]
{{- include "spot-balancer.bindWhereJobsRun" (list $root $component (printf "%s-reconcile" $account)) }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  {{- include "spot-balancer.clusterMetadata" (list $root $component (printf "%s-nodes" $account)) | nindent 2 }}
rules:
  # The capacity type of the node on which an executor runs.
  - apiGroups: [""]
    resources: [nodes]
    verbs: [list, watch]
---
{{ include "spot-balancer.bindEverywhere" (list $root $component (printf "%s-nodes" $account)) }}
{{- if eq $root.Values.store "redis" }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (printf "%s-leader" $account)) | nindent 2 }}
rules:
  # Elect one leader among the replicas. RBAC cannot restrict create to a name.
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    verbs: [create]
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    resourceNames: [{{ include "spot-balancer.reconciler" $root | quote }}]
    verbs: [get, update]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "spot-balancer.metadata" (list $root $component (printf "%s-leader" $account)) | nindent 2 }}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: {{ printf "%s-leader" $account | quote }}}
subjects:
  - {kind: ServiceAccount, name: {{ $account | quote }}, namespace: {{ $root.Release.Namespace | quote }}}
{{- end }}
{{- end }}

{{/* Pods read the Redis URL and CA at startup only, and the pod template does not contain them. The checksum restarts
the pods when one of them changes. */}}
{{- define "spot-balancer.podAnnotations" -}}
{{- $root := index . 0 -}}
{{- $redis := $root.Values.redis -}}
{{- if and (eq $root.Values.store "redis") (or $redis.url $redis.ca) }}
checksum/redis: {{ printf "%s\n%s" $redis.url $redis.ca | sha256sum }}
{{- end }}
{{- with (index . 1).podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The volume and the mount of the CA of an external Redis. */}}
{{- define "spot-balancer.redisCaMount" -}}
{{- if and (eq .Values.store "redis") .Values.redis.ca }}
- {name: redis-ca, mountPath: /redis-ca, readOnly: true}
{{- end }}
{{- end }}

{{- define "spot-balancer.redisCaVolume" -}}
{{- if and (eq .Values.store "redis") .Values.redis.ca }}
- name: redis-ca
  configMap: {name: {{ printf "%s-ca" (include "spot-balancer.redis" .) | quote }}}
{{- end }}
{{- end }}

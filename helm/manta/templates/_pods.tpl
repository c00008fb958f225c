{{- /* Parts of the pods. The head is a group without a name. */}}
{{- define "manta.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "manta.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end -}}

{{- define "manta.podMeta" -}}
labels:
  {{- include "manta.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .head }}
  manta-head: {{ . }}
  {{- end }}
  {{- with .root.Values.podLabels }}{{ toYaml . | nindent 2 }}{{ end }}
{{- with .root.Values.podAnnotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "manta.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- /* Variables of head and workers. Never the database or the admin's token: workers have no use for them. */}}
{{- define "manta.env" -}}
{{- $v := .Values -}}
- {name: MANTA_HOME, value: /var/lib/manta}
- {name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, value: {{ $v.jobs.checkpointSeconds | quote }}}
- {name: RAY_JOB_STOP_WAIT_TIME_S, value: {{ $v.jobs.checkpointSeconds | quote }}}
- {name: RAY_JOB_START_TIMEOUT_SECONDS, value: {{ $v.jobs.startTimeoutSeconds | quote }}}
- {name: RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, value: {{ $v.jobs.startTimeoutSeconds | quote }}}
- {name: RAY_SERVE_USE_GRPC_BY_DEFAULT, value: "1"}
- {name: RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH, value: "2147483647"}
- {name: RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP, value: "0"}
- {name: RAY_worker_niceness, value: "0"}
{{- with $v.tracing }}
{{- if .endpoint }}
- {name: OTEL_EXPORTER_OTLP_ENDPOINT, value: {{ .endpoint | quote }}}
- {name: OTEL_RESOURCE_ATTRIBUTES, value: "k8s.namespace.name={{ $.Release.Namespace }},service.namespace={{ include "manta.name" $ }}"}
{{- if .headersSecret }}
- name: OTEL_EXPORTER_OTLP_HEADERS
  valueFrom: {secretKeyRef: {name: {{ .headersSecret }}, key: headers}}
{{- end }}
{{- range $name, $value := .variables }}
- {name: {{ $name }}, value: {{ $value | quote }}}
{{- end }}
{{- end }}
{{- end }}
{{- with $v.storage.objectStore }}
{{- if .endpoint }}
- {name: AWS_ENDPOINT_URL, value: {{ .endpoint | quote }}}
{{- end }}
{{- if .region }}
- {name: AWS_REGION, value: {{ .region | quote }}}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Of pods without GPUs: the image asks for all, and on a node with GPUs its runtime would show them to Ray. */}}
{{- define "manta.noGpus" -}}
- {name: NVIDIA_VISIBLE_DEVICES, value: void}
{{- end -}}

{{- /* The one variable of the head alone. */}}
{{- define "manta.databaseUrl" -}}
{{- $v := .Values -}}
- name: MANTA_DATABASE_URL
  valueFrom:
    secretKeyRef:
      {{- if eq $v.database.mode "external" }}
      name: {{ $v.database.external.existingSecret }}
      key: {{ $v.database.external.key }}
      {{- else }}
      name: {{ include "manta.name" . }}-postgres
      key: url
      {{- end }}
{{- end -}}

{{- define "manta.volumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/manta}
{{- range .Values.storage.data }}
- {name: data-{{ .name }}, mountPath: {{ .mountPath }}, readOnly: true}
{{- end }}
{{- end -}}

{{- define "manta.volumes" -}}
- name: tmp
  emptyDir: {sizeLimit: {{ .scratch }}}
{{- if .logs }}
# KubeRay mounts a volume of this name at /tmp/ray of the head and its autoscaler; were it not here, one without a limit.
- name: ray-logs
  emptyDir: {sizeLimit: {{ .scratch }}}
{{- end }}
- name: home
  persistentVolumeClaim: {claimName: {{ include "manta.homeClaim" .root }}}
{{- range .root.Values.storage.data }}
- name: data-{{ .name }}
  persistentVolumeClaim: {claimName: {{ .claim }}, readOnly: true}
{{- end }}
{{- end -}}

{{- /* Raylet and agent answer: Ray can use the node, and KubeRay deploys the front end only on a head that is ready. So that
requests come to one that can take them, the Service asks for KubeRay's label ray.io/serve as well: on a head it says
whether Serve's proxy answered. /readyz of the front end says the rest. */}}
{{- define "manta.nodeReady" -}}
httpGet: {path: {{ .path }}, port: 52365}
periodSeconds: 5
timeoutSeconds: 5
failureThreshold: {{ .failures }}
{{- end -}}

{{- /* Whether the port takes connections, which the kernel answers however busy the node is: it never ends training that
is only slow. The container itself ends when its raylet does. */}}
{{- define "manta.alive" -}}
tcpSocket: {port: {{ . }}}
periodSeconds: 30
timeoutSeconds: 10
failureThreshold: 10
{{- end -}}

{{- /* The head of the service (`service`: true), or of a job's own cluster, of a dict with root and service. */}}
{{- define "manta.headGroup" -}}
{{- $v := .root.Values -}}
serviceType: ClusterIP
rayStartParams:
  num-cpus: "0"
  num-gpus: "0"
  dashboard-host: 0.0.0.0
  disable-usage-stats: "true"
template:
  metadata:
    {{- include "manta.podMeta" (dict "root" .root "component" "ray" "head" (.service | ternary "service" "job")) | nindent 4 }}
  spec:
    serviceAccountName: {{ .service | ternary (include "manta.headAccount" .root) (include "manta.workerAccount" .root) }}
    automountServiceAccountToken: {{ and .service $v.autoscaling.enabled }}
    terminationGracePeriodSeconds: {{ add $v.jobs.checkpointSeconds 60 }}
    securityContext: {{- include "manta.podSecurity" . | nindent 6 }}
    {{- include "manta.pullSecrets" .root | nindent 4 }}
    {{- if $v.priorityClasses.create }}
    priorityClassName: {{ .root.Release.Namespace }}-{{ include "manta.name" .root }}-head
    {{- end }}
    {{- with $v.head.nodeSelector }}
    nodeSelector: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $v.head.tolerations }}
    tolerations: {{- toYaml . | nindent 6 }}
    {{- end }}
    containers:
      - name: ray-head
        image: {{ include "manta.image" (dict "root" .root "variant" "cpu") }}
        imagePullPolicy: {{ $v.image.pullPolicy }}
        securityContext: {{- include "manta.containerSecurity" . | nindent 10 }}
        ports:
          - {name: gcs-server, containerPort: 6379}
          - {name: dashboard, containerPort: 8265}
          - {name: metrics, containerPort: 8080}
          {{- if .service }}
          - {name: serve, containerPort: 8000}
          {{- end }}
        env:
          {{- include "manta.env" .root | nindent 10 }}
          {{- include "manta.noGpus" . | nindent 10 }}
          {{- if .service }}
          {{- include "manta.databaseUrl" .root | nindent 10 }}
          {{- end }}
        {{- with $v.storage.objectStore.existingSecret }}
        envFrom:
          - secretRef: {name: {{ . }}}
        {{- end }}
        resources: {{- toYaml $v.head.resources | nindent 10 }}
        startupProbe: {{- include "manta.nodeReady" (dict "path" "/api/healthz" "failures" 60) | nindent 10 }}
        readinessProbe: {{- include "manta.nodeReady" (dict "path" "/api/healthz" "failures" 6) | nindent 10 }}
        livenessProbe: {{- include "manta.alive" 6379 | nindent 10 }}
        volumeMounts:
          {{- include "manta.volumeMounts" .root | nindent 10 }}
          - {name: {{ .service | ternary "admin-token" "job" }}, mountPath: /etc/manta, readOnly: true}
    volumes:
      {{- include "manta.volumes" (dict "root" .root "scratch" $v.head.scratch "logs" .autoscaling) | nindent 6 }}
      {{- if .service }}
      - name: admin-token
        # Whether or not the front end reads it now: with upgrade.strategy None a volume that comes later never arrives.
        projected:
          defaultMode: 0440
          sources:
            - secret:
                name: {{ include "manta.tokensSecret" .root }}
                items: [{key: admin_token, path: admin_token}]
            - secret:
                name: {{ include "manta.tokensSecret" .root }}
                optional: true # a secret of yours need not have it
                items: [{key: metrics_token, path: metrics_token}]
      {{- else }}
      {{- include "manta.jobVolume" . | nindent 6 }}
      {{- end }}
{{- end -}}

{{- /* The job of `manta submit --k8s`, in every pod that its driver may be started in: a driver that trains asks for
CPUs, which the head has none of. */}}
{{- define "manta.jobVolume" -}}
- name: job
  downwardAPI:
    items: [{path: job.json, fieldRef: {fieldPath: "metadata.annotations['manta-job']"}}]
{{- end -}}

{{- /* A worker group of the service (`service`: true), or of a job's own cluster, of a dict with root, group and service. */}}
{{- define "manta.workerGroup" -}}
{{- $v := .root.Values -}}
{{- $g := .group -}}
{{- $gpus := int (default 0 $g.gpus) -}}
{{- $gpu := default "nvidia.com/gpu" $g.gpuResource -}}
groupName: {{ $g.name }}
replicas: {{ $g.minReplicas }}
minReplicas: {{ $g.minReplicas }}
maxReplicas: {{ or $v.autoscaling.enabled (not .service) | ternary $g.maxReplicas $g.minReplicas }}
rayStartParams:
  node-manager-port: "6380"
{{- /* Here and not as num-gpus of rayStartParams: KubeRay refuses a group with resources in both. */}}
{{- with merge (gt $gpus 0 | ternary dict (dict "GPU" 0)) (default dict $g.custom) }}
resources:
  {{- range $name, $amount := . }}
  {{ $name }}: {{ $amount | toString | quote }}
  {{- end }}
{{- end }}
template:
  metadata: {{- include "manta.podMeta" (dict "root" .root "component" "ray") | nindent 4 }}
  spec:
    serviceAccountName: {{ include "manta.workerAccount" .root }}
    automountServiceAccountToken: false
    terminationGracePeriodSeconds: {{ add $v.jobs.checkpointSeconds 60 }}
    securityContext: {{- include "manta.podSecurity" . | nindent 6 }}
    {{- include "manta.pullSecrets" .root | nindent 4 }}
    {{- if $v.priorityClasses.create }}
    priorityClassName: {{ .root.Release.Namespace }}-{{ include "manta.name" .root }}-training
    {{- end }}
    {{- with merge (dict) (default dict $g.nodeSelector) (default false $g.spot | ternary $v.spot.nodeSelector dict) }}
    nodeSelector: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- $gpuTaint := list (dict "key" $gpu "operator" "Exists" "effect" "NoSchedule") }}
    {{- with concat (default list $g.tolerations) (default false $g.spot | ternary $v.spot.tolerations list) (gt $gpus 0 | ternary $gpuTaint list) }}
    tolerations: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $g.spread }}
    topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: {{ . }}
        whenUnsatisfiable: ScheduleAnyway
        labelSelector: {matchLabels: {ray.io/group: {{ $g.name }}}}
    {{- end }}
    containers:
      - name: ray-worker
        image: {{ include "manta.image" (dict "root" .root "variant" (gt $gpus 0 | ternary "cuda" "cpu")) }}
        imagePullPolicy: {{ $v.image.pullPolicy }}
        securityContext: {{- include "manta.containerSecurity" . | nindent 10 }}
        ports:
          - {name: metrics, containerPort: 8080}
        env:
          {{- include "manta.env" .root | nindent 10 }}
          {{- if not $gpus }}
          {{- include "manta.noGpus" . | nindent 10 }}
          {{- end }}
        {{- with $v.storage.objectStore.existingSecret }}
        envFrom:
          - secretRef: {name: {{ . }}}
        {{- end }}
        resources:
          {{- $size := dict "cpu" $g.cpus "memory" $g.memory }}
          {{- if $gpus }}{{ $_ := set $size $gpu $gpus }}{{ end }}
          requests: {{- toYaml $size | nindent 12 }}
          limits: {{- toYaml $size | nindent 12 }}
        startupProbe: {{- include "manta.nodeReady" (dict "path" "/api/local_raylet_healthz" "failures" 60) | nindent 10 }}
        readinessProbe: {{- include "manta.nodeReady" (dict "path" "/api/local_raylet_healthz" "failures" 6) | nindent 10 }}
        livenessProbe: {{- include "manta.alive" 6380 | nindent 10 }}
        volumeMounts:
          {{- include "manta.volumeMounts" .root | nindent 10 }}
          {{- if not .service }}
          - {name: job, mountPath: /etc/manta, readOnly: true}
          {{- end }}
    volumes:
      {{- include "manta.volumes" (dict "root" .root "scratch" (default "20Gi" $g.scratch)) | nindent 6 }}
      {{- if not .service }}
      {{- include "manta.jobVolume" . | nindent 6 }}
      {{- end }}
{{- end -}}

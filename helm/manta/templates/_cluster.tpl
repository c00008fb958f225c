{{- /* What the cluster of the service and the clusters of `manta submit --k8s` have in common. */}}
{{- /* Of a dict with root, service and autoscaling. */}}
{{- define "manta.cluster" -}}
{{- $v := .root.Values -}}
rayVersion: {{ $v.rayVersion }}
authOptions:
  mode: token
  secretName: {{ include "manta.tokensSecret" .root }}
enableInTreeAutoscaling: {{ .autoscaling }}
{{- if .autoscaling }}
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ $v.autoscaling.idleTimeoutSeconds }}
  upscalingMode: {{ $v.autoscaling.upscalingMode }}
  imagePullPolicy: {{ $v.image.pullPolicy }}
  securityContext: {{- include "manta.containerSecurity" . | nindent 4 }}
  volumeMounts: [{name: tmp, mountPath: /tmp}]
  resources: {{- toYaml $v.autoscaling.resources | nindent 4 }}
{{- end }}
headGroupSpec: {{- include "manta.headGroup" . | nindent 2 }}
{{- end -}}
